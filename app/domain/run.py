"""What a run is: its states, why it stops, and which state may follow which."""

from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from enum import IntEnum, StrEnum
from uuid import UUID

from pydantic import JsonValue

from app.domain.agent import Limits


class RunStatus(StrEnum):
    """The state of a run. The last three are terminal and never change."""

    QUEUED = "queued"
    """Accepted and stored; a worker will take it."""
    RUNNING = "running"
    """A worker holds its lease and executes it."""
    WAITING = "waiting"
    """A person has to decide; no worker holds it."""
    SUCCEEDED = "succeeded"
    """It ended with an answer."""
    FAILED = "failed"
    """It ended without one; the stop reason says why."""
    CANCELLED = "cancelled"
    """Somebody stopped it."""

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: dict[RunStatus, frozenset[RunStatus]] = {
    RunStatus.QUEUED: frozenset({RunStatus.RUNNING, RunStatus.CANCELLED}),
    RunStatus.RUNNING: frozenset(
        {RunStatus.QUEUED, RunStatus.WAITING, RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED}
    ),
    RunStatus.WAITING: frozenset({RunStatus.QUEUED, RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED}),
    RunStatus.SUCCEEDED: frozenset(),
    RunStatus.FAILED: frozenset(),
    RunStatus.CANCELLED: frozenset(),
}
"""Which state may follow which. The repository's transitions are checked against it by a test."""


class StopReason(StrEnum):
    """Why a run ended."""

    FINAL_ANSWER = "final_answer"
    """The model gave its answer, and it fits the agent's output."""
    PERSON_ANSWERED = "person_answered"
    """A reviewer gave the answer in the agent's place, and it fits the agent's output."""
    MAX_STEPS = "max_steps"
    """The model was asked as often as the limits allow."""
    MAX_TOKENS = "max_tokens"
    """The tokens of all calls together reached the limit."""
    MAX_COST = "max_cost"
    """The next call might cost more than what is left of the limit."""
    BUDGET = "budget"
    """The next call might cost more than what is left of the tenant's budget for the day."""
    DEADLINE = "deadline"
    """It ran for as long as it may (waiting for a person does not count)."""
    LOOP_DETECTED = "loop_detected"
    """The model asked for the same call with the same arguments too often."""
    MODEL_ERROR = "model_error"
    """No usable reply: the provider refused or stayed away, or the model kept making malformed calls."""
    TOOL_ERROR = "tool_error"
    """Tools failed unexpectedly too often in a row."""
    INVALID_OUTPUT = "invalid_output"
    """The answer did not fit the agent's output, also after corrections."""
    REJECTED = "rejected"
    """A reviewer ended the run."""
    REVIEW_EXPIRED = "review_expired"
    """Nobody decided in time."""
    MAX_ATTEMPTS = "max_attempts"
    """Workers died while executing it as often as the limits allow."""
    CANCELLED = "cancelled"
    """Somebody cancelled it."""
    INTERNAL_ERROR = "internal_error"
    """A bug; the log has it under the run's id."""

    @property
    def status(self) -> RunStatus:
        """The terminal state that goes with this reason."""
        if self in (StopReason.FINAL_ANSWER, StopReason.PERSON_ANSWERED):
            return RunStatus.SUCCEEDED
        if self is StopReason.CANCELLED:
            return RunStatus.CANCELLED
        return RunStatus.FAILED


class Priority(IntEnum):
    """High goes to the front of the queue."""

    NORMAL = 0
    HIGH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunUsage:
    """What all recorded model calls of a run used.

    `cached_tokens` are part of `input_tokens`. `cost_usd` is None when a model without a price was asked.
    """

    model_calls: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost_usd: Decimal | None = Decimal(0)

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTime:
    """Where a run's time went, in milliseconds, up to the last time it changed its state.

    `active_ms`: in the hands of workers; `model_ms` and `tools_ms` are parts of it, calls that were made at the same
    time counted once. `human_ms`: until people had decided.
    """

    queued_ms: int = 0
    human_ms: int = 0
    active_ms: int = 0
    model_ms: int = 0
    tools_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row of the table `runs`, as the rest of the service sees it. Times are UTC, by Postgres' clock.

    `queued_at`: when it was queued last. `waiting_since`: when it began to wait for people, and `lost_since`: when a
    worker took it that died with it, each until the worker that went on with it lets go. `running_since`: when the
    worker that has it took it. `erased_at`: when what people and models wrote was erased. `request_id`, `traceparent`:
    of the request that submitted it. `read_at`: what time it was for Postgres when this was read.
    """

    id: UUID
    tenant: str
    agent: str
    agent_version: str
    input: JsonValue
    metadata: dict[str, str]
    limits: Limits
    priority: Priority
    status: RunStatus
    stop_reason: StopReason | None
    output: JsonValue
    error: str | None
    usage: RunUsage
    attempt: int
    time: RunTime
    created_at: datetime
    queued_at: datetime
    waiting_since: datetime | None
    lost_since: datetime | None
    running_since: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    erased_at: datetime | None
    request_id: str
    traceparent: str | None
    read_at: datetime

    def time_now(self) -> RunTime:
        """Where its time went up to `read_at`: with that in its present state."""
        match self.status:
            case RunStatus.QUEUED:
                return replace(self.time, queued_ms=self.time.queued_ms + _ms(self.queued_at, self.read_at))
            case RunStatus.WAITING:
                return replace(self.time, human_ms=self.time.human_ms + _ms(self.waiting_since, self.read_at))
            case RunStatus.RUNNING:
                return replace(self.time, active_ms=self.time.active_ms + _ms(self.running_since, self.read_at))
            case _:
                return self.time


def _ms(since: datetime | None, until: datetime) -> int:
    # What a statement is shown may have been written after its own `now()`.
    return max(0, round((until - since).total_seconds() * 1000)) if since else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A run as held by one worker: every write carries the token, and counts only while the lease is held."""

    run: Run
    token: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A validated submission. `request_hash` is SHA-256 over the canonical request, for `Idempotency-Key`."""

    id: UUID
    tenant: str
    api_key_id: str
    agent: str
    agent_version: str
    input: JsonValue
    metadata: dict[str, str]
    limits: Limits
    priority: Priority
    idempotency_key: str | None
    request_hash: bytes
    request_id: str
    traceparent: str | None = None
