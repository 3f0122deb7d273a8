"""The shapes of requests and answers: what the OpenAPI document shows."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from app.domain.agent import Agent as DomainAgent
from app.domain.agent import Limits as DomainLimits
from app.domain.audit import AuditEvent as DomainAuditEvent
from app.domain.run import Priority, RunStatus, StopReason
from app.domain.run import Run as DomainRun
from app.domain.step import ModelStep as DomainModelStep
from app.domain.step import Step as DomainStep
from app.domain.step import ToolStep

Dollars = Annotated[Decimal, PlainSerializer(float, return_type=float)]
"""A number in JSON; stored and added up as a decimal."""


# --- requests: nothing is converted, nothing unknown is let through -----------------------------------------------


def _without_defaults(schema: dict[str, Any]) -> None:
    """The defaults are the agent's, not those of the model."""
    for field in schema["properties"].values():
        del field["default"]


def _decimal(value: object) -> object:
    """A JSON number as the decimal that was written, so that 0.1 is 0.1."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("number_type", "Input should be a number")
    return Decimal(str(value))


DollarLimit = Annotated[
    Decimal,
    Field(gt=0, le=10_000),
    WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 10_000}),
]


class LowerLimits(DomainLimits):
    """Limits for this run: at most the agent's own, which hold for those that are left out."""

    model_config = ConfigDict(strict=True, json_schema_extra=_without_defaults)

    max_cost_usd: Annotated[DollarLimit | None, BeforeValidator(_decimal)] = Field(
        None, description="US dollars for all calls."
    )


MetadataName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class SubmitRun(BaseModel):
    """A task for an agent."""

    model_config = ConfigDict(strict=True, extra="forbid")

    agent: str = Field(max_length=64, description="Name of the agent; GET /v1/agents lists them.")
    input: JsonValue = Field(description="What the agent is asked; fits the agent's `input_schema`.")
    limits: LowerLimits = Field(default_factory=LowerLimits, description="Bounds below the agent's own.")
    metadata: dict[MetadataName, MetadataValue] = Field(
        default_factory=dict, max_length=16, description="Yours: kept with the run and given back."
    )
    priority: Literal["normal", "high"] = Field("normal", description="High goes to the front of the queue.")


# --- answers ------------------------------------------------------------------------------------------------------


class Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Limits(DomainLimits):
    """The limits that hold for a run."""

    model_config = ConfigDict(from_attributes=True)

    max_cost_usd: Dollars | None = Field(description="US dollars for all calls; null: the model has no price.")


class RunLatency(Answer):
    """Where the time of a run went so far, in milliseconds.

    `total` is `queued`, `active` and `human` together, and what passed after a worker had died until that was noticed.
    """

    total: int = Field(description="Since it was accepted, until it ended.")
    queued: int = Field(description="Until a worker took it, each time.")
    active: int = Field(description="In the hands of workers.")
    model: int = Field(description="Of `active`: calls of models that were answered, with their retries.")
    tools: int = Field(description="Of `active`: calls of tools; those that were made at the same time count once.")
    human: int = Field(description="Until people had decided.")

    @classmethod
    def of(cls, run: DomainRun) -> Self:
        time = run.time_now()
        passed = (run.ended_at or run.read_at) - run.created_at
        parts = time.queued_ms + time.active_ms + time.human_ms  # each is rounded
        return cls(
            total=max(parts, round(passed.total_seconds() * 1000)),
            queued=time.queued_ms,
            active=time.active_ms,
            model=time.model_ms,
            tools=time.tools_ms,
            human=time.human_ms,
        )


class RunUsage(Answer):
    """What a run used so far: its model calls, and time. `cached_tokens` are part of `input_tokens`."""

    model_calls: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost_usd: Dollars | None = Field(description="US dollars; null when a model without a price was asked.")
    latency_ms: RunLatency

    @classmethod
    def of(cls, run: DomainRun) -> Self:
        counts = {name: getattr(run.usage, name) for name in cls.model_fields if name != "latency_ms"}
        return cls(**counts, latency_ms=RunLatency.of(run))


def _priority_name(value: object) -> object:
    return value.name.lower() if isinstance(value, Priority) else value


class Run(Answer):
    """A run. The last three states are terminal; `stop_reason` says why it ended."""

    id: UUID
    agent: str
    agent_version: str
    status: RunStatus
    stop_reason: StopReason | None
    input: JsonValue
    output: JsonValue
    error: str | None = Field(description="What went wrong, in a sentence; never an internal detail.")
    limits: Limits
    metadata: dict[str, str]
    priority: Annotated[Literal["normal", "high"], BeforeValidator(_priority_name)]
    attempt: int = Field(description="How often a worker has taken it.")
    usage: RunUsage
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    erased_at: datetime | None = Field(description="When what people and models wrote was erased.")
    trace_id: str = Field(description="Of its trace, in every back end: 32 hex digits.")
    traces: dict[str, str] = Field(description="Where people find its trace, by back end: those that are configured.")

    @classmethod
    def of(cls, run: DomainRun, traces: dict[str, str]) -> Self:
        stored = {name: getattr(run, name) for name in cls.model_fields if hasattr(run, name)}
        return cls.model_validate({**stored, "usage": RunUsage.of(run), "trace_id": run.id.hex, "traces": traces})


class RunList(Answer):
    """Newest first."""

    data: list[Run]
    next_cursor: str | None = Field(description="Give it as `cursor` for the next page; null: this is the last.")


class ModelStep(DomainModelStep):
    """One reply of a model."""

    cost_usd: Dollars | None = None


Step = Annotated[ModelStep | ToolStep, Field(discriminator="kind")]


class StepList(Answer):
    """In the order in which they happened."""

    data: list[Step]
    next_cursor: str | None

    @classmethod
    def of(cls, steps: list[DomainStep], next_cursor: str | None) -> Self:
        return cls.model_validate({"data": steps, "next_cursor": next_cursor}, from_attributes=True)


class AuditEvent(Answer):
    """One recorded decision or transition. `seq` counts from 1 without gaps."""

    run_id: UUID
    seq: int
    at: datetime
    actor: str = Field(description="`key:…`, `worker:…`, `sweeper` or `operator:…`.")
    kind: str
    data: dict[str, JsonValue]
    payload: JsonValue = Field(description="What people and models wrote; null: there was nothing, or it was erased.")
    payload_sha256: str | None = Field(description="SHA-256 of its salt and its canonical JSON.")
    hash: str = Field(description="SHA-256 of the event, chained to the one before it.")

    @classmethod
    def of(cls, event: DomainAuditEvent) -> Self:
        return cls.model_validate(event)


class AuditEventList(Answer):
    """In the order in which they happened."""

    data: list[AuditEvent]
    next_cursor: str | None


class Agent(Answer):
    """What can be asked, and how much it may use."""

    name: str
    version: str
    description: str
    input_schema: dict[str, Any] = Field(description="JSON schema of `input`.")
    output_schema: dict[str, Any] | None = Field(description="JSON schema of `output`; null: text.")
    limits: Limits

    @classmethod
    def of(cls, agent: DomainAgent) -> Self:
        return cls(
            name=agent.name,
            version=agent.version,
            description=agent.description,
            input_schema=agent.input_schema,
            output_schema=agent.output.model_json_schema() if agent.output else None,
            limits=Limits.model_validate(agent.limits, from_attributes=True),
        )


class AgentList(Answer):
    """By name."""

    data: list[Agent]
    next_cursor: None = None


class Scaling(Answer):
    """How many workers there should be, and what that follows from: all that is queued and running, of every tenant."""

    desired_workers: int = Field(
        ge=0, description="Start or stop workers until there are so many: up at once, down slowly."
    )
    queued: int = Field(ge=0, description="Runs that no worker holds, and that could be taken now.")
    running: int = Field(ge=0, description="Runs that workers hold.")
    busy_workers: int = Field(ge=0, description="Workers that hold a run.")
    slots_per_worker: int = Field(ge=1, description="Runs that one worker executes at a time.")
    median_run_s: float = Field(ge=0, description="What runs take: the median of those that ended lately.")
    target_drain_s: float = Field(gt=0, description="Seconds in which what is queued should have been taken.")
    min_workers: int = Field(ge=0, description="The fewest that are asked for.")
    max_workers: int = Field(ge=1, description="The most that are asked for, however many are busy.")


class Part(Answer):
    """One thing that the service needs."""

    status: Literal["ok", "away", "behind"]
    detail: str | None = None


class Health(Answer):
    """`degraded`: runs are accepted, but will start late. `unavailable`: nothing can be accepted."""

    status: Literal["ok", "degraded", "unavailable"]
    parts: dict[Literal["postgres", "schema", "redis"], Part]


class Live(Answer):
    status: Literal["ok"] = "ok"


class Version(Answer):
    """What is running."""

    version: str
    image_digest: str = Field(description="Empty outside of an image.")
    git_revision: str = Field(description="The commit it was built from. Empty outside of an image.")
    environment: str


class WrongPlace(BaseModel):
    """One thing that is wrong with a request."""

    pointer: str = Field(description="`#/…` points into the body; `query/…` and `header/…` name a parameter.")
    detail: str


class Problem(BaseModel):
    """An error (RFC 9457). `type` is stable; `detail` is for people."""

    type: str
    title: str
    status: int
    detail: str
    instance: str = Field(description="The path that was asked for.")
    request_id: str = Field(description="As in the header X-Request-Id; the log has it.")
    run_id: UUID | None = Field(None, description="Only where the request is about a run: that run's; the log has it.")
    trace_id: str | None = Field(None, description="Beside `run_id`: that of the run's trace.")
    errors: list[WrongPlace] = Field(default_factory=list)
