"""What the API counts, for Prometheus. Every metric of its requests is an attribute of `Metrics`, and nowhere else.

No label names a tenant, a run or a key: a label has few values, all known beforehand.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from app.domain.errors import BudgetSpent, RateLimited, RequestError, TooManyRuns
from app.registry import Registry

UNKNOWN_ROUTE = "(unknown)"
"""The label of every path that leads nowhere."""
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_OTHER_METHOD = "_OTHER"
# Those that OpenTelemetry advises for this metric.
_DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)


class AuthenticationFailure(StrEnum):
    """Why a caller was not let in."""

    MISSING = "missing"
    """No API key, or something that is not meant as one."""
    INVALID = "invalid"
    """A key that is unknown, expired or revoked."""
    MISSING_SCOPE = "missing_scope"


class Metrics:
    """Made once, at the start of the process. Names begin with `agent_service_`, or are OpenTelemetry's."""

    def __init__(self, registry: CollectorRegistry, agents: Registry) -> None:
        self._registry = registry
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._durations = Histogram(
            "http_server_request_duration_seconds",
            "Duration of requests, to the end of the answer; without the time for which `wait` held it back.",
            ["http_request_method", "http_route", "http_response_status_code"],
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self._accepted = Counter(
            "agent_service_runs_accepted",
            "Runs that were accepted, by agent; the same submission sent again is not another one.",
            ["agent"],
            registry=registry,
        )
        self._refusals = Counter(
            "agent_service_requests_refused",
            "Requests that were answered with a problem, by its type.",
            ["problem"],
            registry=registry,
        )
        self._authentication_failures = Counter(
            "agent_service_authentication_failures",
            "Requests without a key that is good for them, by reason.",
            ["reason"],
            registry=registry,
        )
        self._rate_limit_unchecked = Counter(
            "agent_service_rate_limit_unchecked",
            "Requests let through without a look at their rate, because Redis was away.",
            registry=registry,
        )
        # A series that is there from the beginning shows its first increment.
        for agent in agents:
            self._accepted.labels(agent)
        for refusal in (RateLimited, TooManyRuns, BudgetSpent):
            self._refusals.labels(refusal.problem)
        for reason in AuthenticationFailure:
            self._authentication_failures.labels(reason)

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request is over. `route`: the template that its path fits, or `UNKNOWN_ROUTE`."""
        known = method if method in _METHODS else _OTHER_METHOD
        self._durations.labels(known, route, str(status)).observe(seconds)

    def count_accepted(self, agent: str) -> None:
        """A run of an agent that this process knows."""
        self._accepted.labels(agent).inc()

    def count_refusal(self, problem: type[RequestError]) -> None:
        self._refusals.labels(problem.problem).inc()

    def count_authentication_failure(self, reason: AuthenticationFailure) -> None:
        self._authentication_failures.labels(reason).inc()

    def count_unchecked_rate(self) -> None:
        self._rate_limit_unchecked.inc()

    async def text(self) -> bytes:
        """Everything that this process tells, in Prometheus' text format.

        Written in a thread, because it may be long; of its own, because the event loop's may be waiting for Redis.
        """
        return await asyncio.get_running_loop().run_in_executor(self._writing, generate_latest, self._registry)
