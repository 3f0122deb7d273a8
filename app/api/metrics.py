"""What the API counts, for Prometheus. Every metric of this process is an attribute of `Metrics`, and nowhere else.

No label names a tenant, a run or a key: a label has few values, all known beforehand.
"""

from enum import StrEnum

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from app.api.openapi import problems_without_key
from app.domain.errors import BudgetSpent, RateLimited, RequestError, TooManyRuns


class AuthenticationFailure(StrEnum):
    """Why a caller was not let in."""

    MISSING = "missing"
    """No API key, or something that is not meant as one."""
    INVALID = "invalid"
    """A key that is unknown, expired or revoked."""
    MISSING_SCOPE = "missing_scope"


class Metrics:
    """Made once, at the start of the process. Names begin with `agent_service_`, units are seconds and bytes."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the series
        self._registry = CollectorRegistry()
        self._refusals = Counter(
            "agent_service_requests_refused",
            "Requests that were answered with a problem, by its type.",
            ["problem"],
            registry=self._registry,
        )
        self._authentication_failures = Counter(
            "agent_service_authentication_failures",
            "Requests without a key that is good for them, by reason.",
            ["reason"],
            registry=self._registry,
        )
        self._rate_limit_unchecked = Counter(
            "agent_service_rate_limit_unchecked",
            "Requests let through without a look at their rate, because Redis was away.",
            registry=self._registry,
        )
        # A series that is there from the beginning shows its first increment.
        for refusal in (RateLimited, TooManyRuns, BudgetSpent):
            self._refusals.labels(refusal.problem)
        for reason in AuthenticationFailure:
            self._authentication_failures.labels(reason)

    def count_refusal(self, problem: type[RequestError]) -> None:
        self._refusals.labels(problem.problem).inc()

    def count_authentication_failure(self, reason: AuthenticationFailure) -> None:
        self._authentication_failures.labels(reason).inc()

    def count_unchecked_rate(self) -> None:
        self._rate_limit_unchecked.inc()

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="What was counted",
    description="In Prometheus' text format, of this process alone.",
    response_class=PlainTextResponse,
    responses=problems_without_key(),
)
async def metrics(request: Request) -> Response:
    found: Metrics = request.app.state.services.metrics
    return Response(found.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
