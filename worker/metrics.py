"""What a worker counts, for Prometheus: served as `/metrics` on its health port.

No label names a tenant, a run or a key. Agents, models and tools are labels as far as this worker knows them; what
else a model or a request makes up is counted as `other`.
"""

from decimal import Decimal

from app.domain.review import Review
from app.domain.run import Run
from app.domain.step import ToolState, Usage
from app.registry import Registry


class WorkerMetrics:
    """Made once, at the start of the process. `model`: the setting `MODEL`."""

    def __init__(self, agents: Registry, *, model: str | None) -> None: ...

    def run_claimed(self, run: Run) -> None:
        """A worker has taken it: its wait in the queue is over (`queued_at` to `running_since`)."""

    def run_ended(self, run: Run) -> None:
        """It has reached its terminal state, whoever ended it."""

    def lease_lost(self) -> None:
        """A run was taken away from this worker."""

    def model_called(
        self,
        agent: str,
        model: str,
        seconds: float,
        *,
        usage: Usage | None,
        cost_usd: Decimal | None,
        error: str | None,
    ) -> None:
        """One call, successful or not. `error`: its class, None where it gave a reply."""

    def model_retried(self, agent: str, model: str) -> None:
        """The same model is asked again after a failure."""

    def model_fell_back(self, agent: str, model: str) -> None:
        """This model is asked because the one before it failed."""

    def tool_called(self, agent: str, tool: str, state: ToolState, seconds: float) -> None:
        """One call that was made, or interrupted (`intended`)."""

    def review_closed(self, review: Review) -> None:
        """A person has decided, or nobody did in time."""

    def spans_sent(self, back_end: str, spans: int) -> None:
        """A tracing back end has taken them."""

    def spans_dropped(self, back_end: str, reason: str, spans: int) -> None:
        """They are lost for it: `queue_full`, `failed` or `ended` (the process did before they were sent)."""

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return b""
