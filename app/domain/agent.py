"""What an agent is: instructions, tools, a model and the limits of every run."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, TypeAdapter

from app.domain.canonical import digest
from app.domain.data import DATA_RULE, holds_data
from app.domain.tool import Tool

DEFAULT_MODEL = "gpt-5-mini"
TextInput = Annotated[str, StringConstraints(min_length=1, max_length=100_000, pattern=r"\S")]
"""Text with something in it: what an agent takes when it declares no input of its own."""


class Limits(BaseModel):
    """The bounds of one run. A request may lower them, never raise them; none can be switched off,
    but `max_cost_usd` may be null for an agent whose model has no price."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_steps: int = Field(10, ge=1, le=1_000, description="Model calls.")
    max_tokens: int = Field(100_000, ge=1, le=100_000_000, description="Input and output tokens of all calls together.")
    max_cost_usd: Decimal | None = Field(Decimal("0.50"), gt=0, le=10_000, description="US dollars for all calls.")
    deadline_s: float = Field(300, gt=0, le=86_400, description="Seconds of running time; waiting does not count.")
    max_repeats: int = Field(3, ge=1, le=100, description="Times the same tool may be called with the same arguments.")
    max_attempts: int = Field(5, ge=1, le=100, description="Workers that may die while executing the run.")
    max_mistakes: int = Field(3, ge=0, le=100, description="Mistakes in a row that the model may correct.")


class OnLimit(StrEnum):
    """What happens when a run reaches a limit."""

    STOP = "stop"
    """It ends."""
    ESCALATE = "escalate"
    """A person is asked: raise the limit, end the run, or answer in the agent's place."""


class OnExpiry(StrEnum):
    """What happens when nobody decides a review in time. It is never approved."""

    END = "end"
    """The run ends."""
    REJECT = "reject"
    """The call is not made, the model is told that nobody decided, and the run goes on. Where there is nothing to
    reject, a call in doubt or a limit, the run ends."""
    ESCALATE = "escalate"
    """A second queue of reviewers is asked, for as long again; after that the run ends."""


class Capture(StrEnum):
    """What of a run's content (inputs, outputs, arguments, results, instructions) goes into its trace."""

    FULL = "full"
    """All of it; only the service's own secrets are hidden."""
    REDACTED = "redacted"
    """Without secrets, e-mail addresses, card numbers and what `REDACT_PATTERNS` names."""
    NONE = "none"
    """None of it: names, numbers, times and states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewRules:
    """What an agent wants of every review: see `Agent`. `expires_s`: seconds that each queue has for its decision."""

    expires_s: float
    on_expiry: OnExpiry
    four_eyes: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Agent:
    """An agent, as its author writes it.

    `input`: what a request must send; text by default, or a pydantic model, given to the model as JSON.
    `output`: a pydantic model that the answer must fit; None means text.
    `instructions`: the system prompt, or a function that makes it from the run's validated input.
    `model_timeout_s`: seconds for one model call. `max_output_tokens`: the most that one reply may hold.
    `review_expires_s`: seconds that a person has for a decision. `four_eyes`: the key that submitted a run never
    decides about it, and whoever edited a call's arguments not about those. `capture`: see `Capture`.
    """

    name: str
    instructions: str | Callable[[JsonValue], str]
    description: str = ""
    version: str = "1"
    tools: Sequence[Tool] = ()
    model: str = DEFAULT_MODEL
    fallback_models: Sequence[str] = ()
    input: type[BaseModel] | None = None
    output: type[BaseModel] | None = None
    limits: Limits = field(default_factory=Limits)
    max_output_tokens: int = 4_096
    model_timeout_s: float = 60.0
    on_limit: OnLimit = OnLimit.STOP
    review_expires_s: float = 24 * 3600.0
    on_review_expiry: OnExpiry = OnExpiry.END
    four_eyes: bool = False
    capture: Capture = Capture.REDACTED

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", self.name):
            raise ValueError(f"agent name {self.name!r}: use lower-case letters, digits, '-' and '_', at most 64")
        object.__setattr__(self, "on_limit", OnLimit(self.on_limit))
        object.__setattr__(self, "on_review_expiry", OnExpiry(self.on_review_expiry))
        object.__setattr__(self, "capture", Capture(self.capture))
        names = [tool.name for tool in self.tools]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"agent {self.name!r} lists a tool twice: {', '.join(sorted(repeated))}")

    @cached_property
    def tools_by_name(self) -> dict[str, Tool]:
        return {tool.name: tool for tool in self.tools}

    @cached_property
    def prompt_sha256(self) -> str:
        """SHA-256 (hex) of what the model is always given: tools, output and, where they are text, the instructions.

        What is told of data is a part of these.
        """
        tools: list[JsonValue] = [[tool.name, tool.description, tool.schema] for tool in self.tools]
        if isinstance(self.instructions, str):
            instructions: str | None = self._with_rule(self.instructions)
        else:
            instructions = DATA_RULE if self.tools else None
        return digest([instructions, tools, self.output.model_json_schema() if self.output else None])

    @property
    def review_rules(self) -> ReviewRules:
        return ReviewRules(expires_s=self.review_expires_s, on_expiry=self.on_review_expiry, four_eyes=self.four_eyes)

    @cached_property
    def _input(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.input or TextInput)

    @cached_property
    def input_schema(self) -> dict[str, Any]:
        """JSON schema of `input` in a request."""
        return self._input.json_schema()

    def validate_input(self, value: JsonValue) -> JsonValue:
        """The input as it is stored and given to the model. What `input_schema` does not allow is not converted: 1 is
        not true.

        Raises `pydantic.ValidationError`.
        """
        valid = self._input.validate_json(json.dumps(value), strict=True)
        stored: JsonValue = self._input.dump_python(valid, mode="json")
        return stored

    def render_instructions(self, value: JsonValue) -> str:
        """What the model is told first. `value`: the run's input."""
        return self._with_rule(self.instructions if isinstance(self.instructions, str) else self.instructions(value))

    def _with_rule(self, instructions: str) -> str:
        return f"{instructions}\n\n{DATA_RULE}" if self.tools or holds_data(instructions) else instructions
