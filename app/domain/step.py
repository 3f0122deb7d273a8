"""What a run did: one model step for each model call, one tool step for each tool call, in order and without gaps."""

from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from app.domain.tool import Effect


class Usage(BaseModel):
    """Tokens of one model call; the cached ones are part of the input."""

    model_config = ConfigDict(frozen=True)

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class ToolCall(BaseModel):
    """A call as the model asked for it: `arguments` is what it wrote, not necessarily valid JSON."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    arguments: str


class ModelStep(BaseModel):
    """One reply of a model.

    `correction` is what the model is told when the reply cannot be used, and asked again.
    `retries` counts the calls that failed before this one, over all models tried.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["model"] = "model"
    seq: int
    attempt: int
    model: str
    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    correction: str | None = None
    usage: Usage = Usage()
    cost_usd: Decimal | None = None
    duration_ms: int = 0
    retries: int = 0
    recorded_at: datetime | None = None


class ToolState(StrEnum):
    """What became of a tool call."""

    INTENDED = "intended"
    """About to be made: committed before a call that is not READ, so that a crash in it is seen."""
    SUCCEEDED = "succeeded"
    """It returned; the result went to the model."""
    FAILED = "failed"
    """It said that it did not work (`ToolError`); the model was told why."""
    CRASHED = "crashed"
    """It raised something else, or took too long; the model was told that much."""
    INVALID = "invalid"
    """Never made: no such tool, or arguments that do not fit; the model was told what is wrong."""
    REJECTED = "rejected"
    """Never made: a person said no; the model was told the reason."""
    IN_DOUBT = "in_doubt"
    """It may or may not have happened, and is not repeated; a person is asked, or the run has ended."""

    @property
    def is_answered(self) -> bool:
        """Has the model been given a result for this call?"""
        return self not in (ToolState.INTENDED, ToolState.IN_DOUBT)


class ToolStep(BaseModel):
    """One call of a tool. `arguments` are the validated ones, or the model's text where they did not fit.

    `result` is what the model is given; `note` what it is told beside that by us, not by the tool. `from_person`: the
    result is what a person said in place of the tool.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["tool"] = "tool"
    seq: int
    attempt: int
    call_id: str
    tool: str
    arguments: JsonValue
    effect: Effect | None
    state: ToolState
    result: str | None = None
    note: str | None = None
    from_person: bool = False
    idempotency_key: str
    duration_ms: int = 0
    recorded_at: datetime | None = None


Step = Annotated[ModelStep | ToolStep, Field(discriminator="kind")]
