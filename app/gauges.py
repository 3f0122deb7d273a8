"""Gauges of the whole service, for Prometheus: read from Postgres when somebody looks, at most every few seconds."""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.background import within
from app.db.gauges import MAX_UNSEALED, STUCK, ServiceState, read_state
from app.db.scaling import read_load
from app.domain.review import ReviewKind, ReviewQueue
from app.domain.run import RunStatus
from app.domain.scaling import Load, ScalingRules, desired_workers
from app.metrics import OTHER
from app.registry import Registry

FRESH_SECONDS = 5.0
"""For so long what was read is told again: whoever may reach the port may ask, and has no key."""
_PATIENCE_SECONDS = 2.0
"""Prometheus waits for ten, and the counters of this process do not need Postgres."""
_OPEN = [status for status in RunStatus if not status.is_terminal]
_NUMBERS = (
    (
        "agent_service_oldest_queued_seconds",
        "For how long the run that was queued first has been in the queue.",
        "oldest_queued_s",
    ),
    ("agent_service_stuck_runs", f"Runs that are {STUCK}.", "stuck_runs"),
    ("agent_service_oldest_review_seconds", "For how long the oldest review has been pending.", "oldest_review_s"),
    (
        "agent_service_audit_unsealed_runs",
        f"Runs whose audit has changed since it was sealed; {MAX_UNSEALED} of them are counted at most.",
        "unsealed_runs",
    ),
    (
        "agent_service_audit_oldest_unsealed_seconds",
        "How long ago an audit that is not sealed was written to; of several, the longest.",
        "oldest_unsealed_s",
    ),
    (
        "agent_service_audit_unanchored_checkpoints",
        "Checkpoints of the audit that are not known to be kept outside of the database.",
        "unanchored_checkpoints",
    ),
)
"""What has no labels: its name, what it is, and where `ServiceState` has it."""

Labelled = Mapping[tuple[str, str], int]

logger = logging.getLogger(__name__)


class StateGauges(Collector):
    """Every process tells the same, so that their maximum is the service's; what cannot be read is not told."""

    def __init__(
        self, registry: CollectorRegistry, engine: AsyncEngine, agents: Registry, scaling: ScalingRules
    ) -> None:
        self._engine = engine
        self._agents = agents
        self._scaling = scaling
        self._state: ServiceState | None = None
        self._load: Load | None = None
        self._fresh_until = 0.0
        self._one_at_a_time = asyncio.Lock()
        self._failures = Counter(
            "agent_service_state_read_failures",
            "How often Postgres did not say how the whole service stands; its gauges are missing then.",
            registry=registry,
        )
        registry.register(self)

    async def refresh(self) -> None:
        """Read them unless they were just now. Takes two seconds at most, also where Postgres does not answer."""
        async with self._one_at_a_time:
            if time.monotonic() < self._fresh_until:
                return
            try:
                self._state, self._load = await within(_PATIENCE_SECONDS, self._read())
            except (SQLAlchemyError, TimeoutError) as error:
                self._state = self._load = None
                self._failures.inc()
                logger.warning("gauges of the service cannot be read: %s", error or "no answer in time")
            self._fresh_until = time.monotonic() + FRESH_SECONDS

    async def load(self) -> Load | None:
        """What the number of workers is decided by, not older than the gauges; None where it cannot be read."""
        await self.refresh()
        return self._load

    async def _read(self) -> tuple[ServiceState, Load]:
        async with self._engine.connect() as connection:
            return await read_state(connection), await read_load(connection)

    def collect(self) -> Iterator[Metric]:
        """As `prometheus_client` asks for them. Without a state there are their names alone."""
        state = self._state
        for name, documentation, field in _NUMBERS:
            yield GaugeMetricFamily(name, documentation, value=getattr(state, field) if state else None)
        yield GaugeMetricFamily(
            "agent_service_desired_workers",
            "How many workers there should be now; GET /v1/scaling says why.",
            value=desired_workers(self._load, self._scaling) if self._load else None,
        )
        yield GaugeMetricFamily(
            "agent_service_max_workers",
            "How many workers are asked for at most: MAX_WORKERS.",
            value=self._scaling.max_workers,
        )
        yield _by_labels(
            "agent_service_runs",
            "Runs that have not ended.",
            ("agent", "status"),
            self._runs_of(state) if state else {},
        )
        yield _by_labels(
            "agent_service_reviews_pending",
            "Reviews that wait for a decision.",
            ("queue", "kind"),
            _reviews_of(state) if state else {},
        )

    def _runs_of(self, state: ServiceState) -> Labelled:
        """A zero where an agent has none. Agents that this process does not know are one."""
        runs = {(agent, status.value): 0 for agent in (*self._agents, OTHER) for status in _OPEN}
        for (agent, status), count in state.runs.items():
            runs[agent if agent in self._agents else OTHER, status.value] += count
        return runs


def _reviews_of(state: ServiceState) -> Labelled:
    return {(queue, kind): state.reviews.get((queue, kind), 0) for queue in ReviewQueue for kind in ReviewKind}


def _by_labels(name: str, documentation: str, labels: Sequence[str], values: Labelled) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=labels)
    for of, value in values.items():
        family.add_metric(of, value)
    return family
