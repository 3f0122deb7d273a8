"""What the API and a worker tell Prometheus alike: of the build, the process, and how late their event loop is."""

import asyncio
import time

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from app import __version__
from app.domain.build import Build

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""Of what `/metrics` answers."""
OTHER = "other"
"""The label of a name that this process does not know, so that nobody can make up series."""
LOOK_SECONDS = 0.25
"""How often it is measured how late the event loop is."""
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


def make_registry(build: Build) -> CollectorRegistry:
    """Where a process keeps its metrics, with the build and the process itself (`process_*`). One for each process."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the series
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    info = Gauge(
        "agent_service_build_info",
        "Always 1: which build this is.",
        ["version", "image_digest", "git_revision", "environment"],
        registry=registry,
    )
    info.labels(__version__, build.image_digest, build.git_revision, build.environment).set(1)
    return registry


class EventLoopLag:
    """How much later than it should a task of the event loop goes on: what all requests or runs wait for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "agent_service_event_loop_lag_seconds",
            f"How late the event loop was, looked at every {LOOK_SECONDS:g} s.",
            buckets=_LAG_BUCKETS,
            registry=registry,
        )

    async def keep_measuring(self) -> None:
        """For ever, as a task of the loop that is measured."""
        while True:
            due = time.monotonic() + LOOK_SECONDS  # uvloop's own clock stands still while a callback runs
            await asyncio.sleep(LOOK_SECONDS)
            self._seconds.observe(max(0.0, time.monotonic() - due))
