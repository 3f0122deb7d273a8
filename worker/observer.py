"""Who is told what happens to runs: Prometheus always, tracing back ends where some are configured.

The loop knows nothing of it: a run's model and tool caller are watched from outside. Nothing here raises: no run fails
because it cannot be told of.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol
from uuid import UUID

from app.domain.agent import Agent
from app.domain.errors import ModelError
from app.domain.review import Review, ReviewStatus
from app.domain.run import Run, RunStatus
from app.domain.step import ToolStep
from worker.llm.base import Model, ModelReply, ModelRequest
from worker.metrics import WorkerMetrics
from worker.state import RunState

if TYPE_CHECKING:  # loads OpenTelemetry, which costs memory where nothing is traced
    from worker.tracing import RunTrace, Tracer


logger = logging.getLogger(__name__)

CallKind = Literal["first", "retry", "fallback"]
"""Is the same model asked again, or the next one because the one before it failed?"""


class Scorer(Protocol):
    """Takes judgements about runs, for back ends that keep some beside traces."""

    def score(
        self,
        run_id: UUID,
        name: str,
        value: float | str,
        *,
        kind: Literal["BOOLEAN", "CATEGORICAL", "NUMERIC"],
        comment: str | None = None,
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Observer:
    """Of all runs of this process. `tracer`, `scorer`: None where nothing is traced."""

    metrics: WorkerMetrics
    agents: Mapping[str, Agent]
    tracer: "Tracer | None" = None
    scorer: Scorer | None = None

    def claimed(self, run: Run) -> "RunObserver":
        """This worker has taken a run."""
        trace = None
        with _harmless():
            self.metrics.run_claimed(run)
            trace = self._trace(run)
            if trace is not None:
                assert run.running_since is not None
                if run.lost_since is not None:
                    trace.lost(run.lost_since, run.queued_at)
                trace.queued(run.running_since)
        return RunObserver(self, run, trace)

    def reviewed(self, run: Run, reviews: Sequence[Review]) -> None:
        """A run goes on, or has ended: the reviews that it waited for, of all that it ever had."""
        if run.waiting_since is None:
            return
        with _harmless():
            trace, until = self._trace(run), run.ended_at or run.queued_at
            for review in (review for review in reviews if review.created_at >= run.waiting_since):
                if review.status in (ReviewStatus.DECIDED, ReviewStatus.EXPIRED):
                    self.metrics.review_closed(review)
                if trace is not None:
                    trace.reviewed(review, until)
                if self.scorer is not None and review.decision is not None:
                    self.scorer.score(run.id, "human_decision", review.decision, kind="CATEGORICAL")

    def ended(self, run: Run) -> None:
        """A run has reached its terminal state."""
        with _harmless():
            self.metrics.run_ended(run)
            trace = self._trace(run)
            if trace is not None:
                assert run.ended_at is not None
                if run.lost_since is not None:
                    trace.lost(run.lost_since, run.queued_at)
                if run.attempt == 0:  # nobody else has said that it was queued
                    trace.queued(run.ended_at)
                trace.ended()
            if self.scorer is not None and run.status is not RunStatus.CANCELLED:
                self.scorer.score(run.id, "succeeded", float(run.status is RunStatus.SUCCEEDED), kind="BOOLEAN")

    def _trace(self, run: Run) -> "RunTrace | None":
        return self.tracer.trace(run, self.agents.get(run.agent)) if self.tracer else None


@dataclass(slots=True)
class RunObserver:
    """Of one run in this worker's hands."""

    observer: Observer
    run: Run
    trace: "RunTrace | None"

    def watched(self, model: Model, state: RunState) -> Model:
        """A model that is asked for the next step of this run, and watched while it is."""
        return _WatchedModel(model, self, state)

    def model_called(
        self,
        request: ModelRequest,
        state: RunState,
        seconds: float,
        answer: ModelReply | BaseException,
        *,
        number: int,
        kind: CallKind,
    ) -> None:
        """One call. See `RunTrace.model_called`."""
        with _harmless():
            metrics, agent = self.observer.metrics, self.run.agent
            if kind == "retry":
                metrics.model_retried(agent, request.model)
            elif kind == "fallback":
                metrics.model_fell_back(agent, request.model)
            usage = answer.usage if isinstance(answer, ModelReply) else None
            price = state.prices.get(request.model)
            metrics.model_called(
                agent,
                request.model,
                seconds,
                usage=usage,
                cost_usd=price.of(usage) if price and usage else None,
                error=None if isinstance(answer, ModelReply) else type(answer).__name__,
            )
            if self.trace is not None:
                self.trace.model_called(request, state, seconds, answer, number=number, kind=kind)

    def tool_called(self, step: ToolStep, seconds: float) -> None:
        """One call that was made, or broken off."""
        with _harmless():
            self.observer.metrics.tool_called(self.run.agent, step.tool, step.state, seconds)
            if self.trace is not None:
                agent = self.observer.agents.get(self.run.agent)
                is_known = agent is not None and step.tool in agent.tools_by_name
                self.trace.tool_called(step, seconds, is_known=is_known)


@dataclass(slots=True)
class _WatchedModel:
    """For one step of a run: counts the calls that it takes."""

    model: Model
    observer: RunObserver
    state: RunState
    asked: list[str] = field(default_factory=list)

    async def complete(self, request: ModelRequest) -> ModelReply:
        kind: CallKind = "first"
        if self.asked:
            kind = "retry" if self.asked[-1] == request.model else "fallback"
        self.asked.append(request.model)
        began = time.monotonic()
        try:
            answer = await self.model.complete(request)
        except (ModelError, asyncio.CancelledError) as error:
            self._tell(request, began, error, kind)
            raise
        self._tell(request, began, answer, kind)
        return answer

    def _tell(
        self,
        request: ModelRequest,
        began: float,
        answer: ModelReply | BaseException,
        kind: CallKind,
    ) -> None:
        seconds = time.monotonic() - began
        self.observer.model_called(request, self.state, seconds, answer, number=len(self.asked), kind=kind)


@contextmanager
def _harmless() -> Iterator[None]:
    try:
        yield
    except Exception:  # whatever it is, the run is innocent
        logger.exception("telemetry failed")
