"""What a worker counts, for Prometheus: served as `/metrics` on its health port.

No label names a tenant, a run or a key. Agents, models and tools are labels as far as this worker knows them; what
else a model or a request makes up is counted as `other`. Names that begin with `gen_ai_`, and their labels and buckets,
are those of OpenTelemetry's conventions.

A series whose first value is 1 looks to Prometheus as if it had always been 1: `rate` misses that first event. So every
counter whose labels are known beforehand begins at 0: all ends of every agent's runs, all states of its tools' calls. A
histogram has some fifteen series for each set of labels, and begins only with the set that is usual: success.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from app.domain.agent import Agent, OnLimit
from app.domain.review import Review, ReviewKind
from app.domain.run import Run, RunStatus, StopReason
from app.domain.step import ToolState, Usage
from app.domain.tool import Effect
from app.metrics import OTHER, EventLoopLag
from app.registry import models_of
from worker.semconv import OPENAI

_GEN_AI = ("gen_ai_agent_name", "gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
_CHAT = "chat"
_ANSWERED = ""
"""The error type of a call that gave a reply."""
_ERRORS = frozenset({_ANSWERED, "ModelUnavailable", "ModelRefused", "CancelledError"})
_EXPIRED = "expired"

_RUN_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1_800, 3_600, 14_400, 86_400)
_QUEUE_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOOL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_REVIEW_SECONDS = (10, 30, 60, 300, 900, 1_800, 3_600, 7_200, 14_400, 28_800, 86_400, 259_200, 604_800)
_STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100)
_TOKENS = tuple(4**power for power in range(14))
_MODEL_SECONDS = tuple(0.01 * 2**power for power in range(14))


class Rescue(StrEnum):
    """What became of a run that its worker did not end."""

    REQUEUED = "requeued"
    """Its lease was over; another worker goes on."""
    GIVEN_UP = "given_up"
    """Its lease was over, once too often."""
    OVERDUE = "overdue"
    """It was past its deadline."""


class Drop(StrEnum):
    """Why a tracing back end did not get spans."""

    QUEUE_FULL = "queue_full"
    """It takes them more slowly than they are made."""
    FAILED = "failed"
    """It refused them, or did not answer."""
    ENDED = "ended"
    """The process ended before they were sent."""


class WorkerMetrics:
    """Made once, at the start of the process. `model`: the setting `MODEL`. Counts from any thread."""

    def __init__(self, registry: CollectorRegistry, agents: Mapping[str, Agent], *, model: str | None) -> None:
        self._registry = registry
        self._models = {agent.name: frozenset(models_of(agent, model)) for agent in agents.values()}
        self._tools = {agent.name: frozenset(agent.tools_by_name) for agent in agents.values()}

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(name, meaning, labels, registry=registry)

        def histogram(name: str, meaning: str, *labels: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, meaning, labels, buckets=buckets, registry=registry)

        self._runs_ended = counter(
            "agent_service_runs_ended_total",
            "Runs that reached their terminal state, by why they stopped.",
            *("agent", "status", "stop_reason"),
        )
        self._runs_escalated = counter(
            "agent_service_runs_escalated_total", "Runs that ended and had waited for a person.", "agent"
        )
        self._run_duration = histogram(
            "agent_service_run_duration_seconds",
            "From the acceptance of a run to its end.",
            *("agent", "status"),
            buckets=_RUN_SECONDS,
        )
        self._run_execution = histogram(
            "agent_service_run_execution_seconds",
            "How long a run that ended was in the hands of workers: without the queue and people.",
            *("agent", "status"),
            buckets=_RUN_SECONDS,
        )
        self._queue_wait = histogram(
            "agent_service_run_queue_wait_seconds",
            "How long a run was queued, each time that a worker took it.",
            "agent",
            buckets=_QUEUE_SECONDS,
        )
        self._steps = histogram("agent_service_run_steps", "Model calls of a run that ended.", "agent", buckets=_STEPS)
        self._tokens = histogram(
            "gen_ai_client_token_usage",
            "Tokens of a model call; the cached ones are part of the input.",
            *(*_GEN_AI, "gen_ai_token_type"),
            buckets=_TOKENS,
        )
        self._model_duration = histogram(
            "gen_ai_client_operation_duration_seconds",
            "Model calls, each try by itself. The error type is empty for a reply.",
            *(*_GEN_AI, "error_type"),
            buckets=_MODEL_SECONDS,
        )
        self._cost = counter(
            "agent_service_cost_usd_total",
            "US dollars for model calls, as far as the models have prices.",
            *("agent", "model"),
        )
        self._cached_tokens = counter(
            "agent_service_cached_input_tokens_total",
            "Input tokens that the provider had cached.",
            *("agent", "model"),
        )
        self._retries = counter(
            "agent_service_model_retries_total",
            "Model calls that were made because the one before, of the same model, had failed.",
            *("agent", "model"),
        )
        self._fallbacks = counter(
            "agent_service_model_fallbacks_total",
            "Times that this model was asked because the one before it in the list had failed.",
            *("agent", "model"),
        )
        self._tool_calls = counter(
            "agent_service_tool_calls_total",
            "Tool calls by what became of them, also those that were never made; intended: broken off.",
            *("agent", "tool", "state"),
        )
        self._tool_duration = histogram(
            "agent_service_tool_duration_seconds",
            "Tool calls that were made, however they ended.",
            *("agent", "tool"),
            buckets=_TOOL_SECONDS,
        )
        self._review_wait = histogram(
            "agent_service_review_wait_seconds",
            "From the question to the decision, or to the end of the time for it.",
            *("agent", "kind", "outcome"),
            buckets=_REVIEW_SECONDS,
        )
        self._lease_losses = counter(
            "agent_service_lease_losses_total",
            "Runs that were taken away from this worker while it executed them, other than by a cancellation.",
        )
        self._rescued = counter(
            "agent_service_rescued_runs_total",
            "Runs that their workers did not end, by what the sweeper did with them.",
            "outcome",
        )
        self._slots = Gauge(
            "agent_service_worker_slots",
            "Runs that this worker executes (busy), and that it could execute beside them (free).",
            ["state"],
            registry=registry,
        )
        self._sent = counter(
            "agent_service_telemetry_sent_total",
            "Spans that a tracing back end has taken.",
            "back_end",
        )
        self._dropped = counter(
            "agent_service_telemetry_dropped_total",
            "Spans that are lost for a tracing back end.",
            *("back_end", "reason"),
        )
        self._drops: dict[tuple[str, Drop], Counter] = {}
        self.loop_lag = EventLoopLag(registry)
        for outcome in Rescue:
            self._rescued.labels(outcome)
        for agent in agents.values():
            self._begin(agent)

    def _begin(self, agent: Agent) -> None:
        """Its series, from the beginning."""
        name = agent.name
        for reason in StopReason:
            self._runs_ended.labels(name, reason.status, reason)
        self._runs_escalated.labels(name)
        for usual in (self._run_duration, self._run_execution):
            usual.labels(name, RunStatus.SUCCEEDED)
        self._queue_wait.labels(name)
        self._steps.labels(name)
        for model in self._models[name]:
            for of_model in (self._cost, self._cached_tokens, self._retries, self._fallbacks):
                of_model.labels(name, model)
            self._model_duration.labels(name, _CHAT, OPENAI, model, _ANSWERED)
            for token_type in ("input", "output"):
                self._tokens.labels(name, _CHAT, OPENAI, model, token_type)
        for tool in agent.tools:
            for state in ToolState:
                self._tool_calls.labels(name, tool.name, state)
            if not tool.asks_person:
                self._tool_duration.labels(name, tool.name)
        for kind in _kinds(agent):
            self._review_wait.labels(name, kind, _EXPIRED)

    def watch_slots(self, slots: int, busy: Callable[[], int], *, is_closed: Callable[[], bool]) -> None:
        """Where to look how many of the slots are in use. `is_closed`: nothing more is taken, so none is free."""
        self._slots.labels("busy").set_function(busy)
        self._slots.labels("free").set_function(lambda: 0 if is_closed() else max(0, slots - busy()))

    def watch_back_ends(self, names: Iterable[str]) -> None:
        """The tracing back ends of this process."""
        for name in names:
            self._sent.labels(name)
            for reason in Drop:
                self._drop(name, reason)

    def run_claimed(self, run: Run) -> None:
        """A worker has taken it: its wait in the queue is over (`queued_at` to `running_since`)."""
        assert run.running_since is not None
        self._queue_wait.labels(self._agent(run.agent)).observe(_seconds(run.queued_at, run.running_since))

    def run_ended(self, run: Run) -> None:
        """It has reached its terminal state, whoever ended it."""
        assert run.ended_at is not None
        agent = self._agent(run.agent)
        self._runs_ended.labels(agent, run.status, run.stop_reason).inc()
        if run.time.human_ms:
            self._runs_escalated.labels(agent).inc()
        self._run_duration.labels(agent, run.status).observe(_seconds(run.created_at, run.ended_at))
        self._run_execution.labels(agent, run.status).observe(run.time.active_ms / 1000)
        self._steps.labels(agent).observe(run.usage.model_calls)

    def lease_lost(self) -> None:
        """A run was taken away from this worker."""
        self._lease_losses.inc()

    def runs_rescued(self, outcome: Rescue, runs: int) -> None:
        """The sweeper has put so many right."""
        self._rescued.labels(outcome).inc(runs)

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
        agent, model = self._model(agent, model)
        labels = agent, _CHAT, OPENAI, model
        self._model_duration.labels(*labels, _known(error or _ANSWERED, _ERRORS)).observe(seconds)
        if usage is not None:
            self._tokens.labels(*labels, "input").observe(usage.input_tokens)
            self._tokens.labels(*labels, "output").observe(usage.output_tokens)
            self._cached_tokens.labels(agent, model).inc(usage.cached_tokens)
        if cost_usd is not None:
            self._cost.labels(agent, model).inc(float(cost_usd))

    def model_retried(self, agent: str, model: str) -> None:
        """The same model is asked again after a failure."""
        self._retries.labels(*self._model(agent, model)).inc()

    def model_fell_back(self, agent: str, model: str) -> None:
        """This model is asked because the one before it failed."""
        self._fallbacks.labels(*self._model(agent, model)).inc()

    def tool_called(self, agent: str, tool: str, state: ToolState, seconds: float) -> None:
        """One call that was made, or broken off (`intended`). `seconds`: 0 where it was answered without being made."""
        tool = _known(tool, self._tools.get(agent, frozenset()))
        agent = self._agent(agent)
        self._tool_calls.labels(agent, tool, state).inc()
        if seconds > 0:
            self._tool_duration.labels(agent, tool).observe(seconds)

    def review_closed(self, review: Review) -> None:
        """A person has decided, or nobody did in time."""
        outcome = review.decision or _EXPIRED
        seconds = _seconds(review.created_at, review.decided_at or review.expires_at)
        self._review_wait.labels(self._agent(review.agent), review.kind, outcome).observe(seconds)

    def spans_sent(self, back_end: str, spans: int) -> None:
        """A tracing back end has taken them."""
        self._sent.labels(back_end).inc(spans)

    def spans_dropped(self, back_end: str, reason: Drop, spans: int) -> None:
        """They are lost for it."""
        self._drop(back_end, reason).inc(spans)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)

    def _drop(self, back_end: str, reason: Drop) -> Counter:
        """Looked up once: where no back end takes anything, this is all that its spans cost."""
        found = self._drops.get((back_end, reason))
        if found is None:
            found = self._drops[back_end, reason] = self._dropped.labels(back_end, reason)
        return found

    def _agent(self, name: str) -> str:
        return name if name in self._models else OTHER

    def _model(self, agent: str, model: str) -> tuple[str, str]:
        return self._agent(agent), _known(model, self._models.get(agent, frozenset()))


def _known(name: str, names: frozenset[str]) -> str:
    return name if name in names else OTHER


def _kinds(agent: Agent) -> Iterable[ReviewKind]:
    """What people may be asked by its runs."""
    if any(tool.approval for tool in agent.tools):
        yield ReviewKind.APPROVAL
    if any(tool.effect is Effect.ONCE for tool in agent.tools):
        yield ReviewKind.IN_DOUBT
    if any(tool.asks_person for tool in agent.tools):
        yield ReviewKind.QUESTION
    if agent.on_limit is OnLimit.ESCALATE:
        yield ReviewKind.LIMIT


def _seconds(since: datetime, until: datetime) -> float:
    return max(0.0, (until - since).total_seconds())
