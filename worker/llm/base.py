"""What the loop knows of a model: a request, a reply, and that asking may fail (`ModelUnavailable`, `ModelRefused`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel

from app.domain.step import ToolCall, Usage
from app.domain.tool import Tool


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One entry of the transcript. `tool_calls` with role assistant, `tool_call_id` with role tool."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """What is asked. `max_output_tokens` bounds the reply, `timeout_s` (seconds) this one call."""

    model: str
    messages: Sequence[Message]
    tools: Sequence[Tool]
    output: type[BaseModel] | None
    max_output_tokens: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReply:
    """What came back. `finish_reason` as the provider gives it: stop, length, tool_calls, content_filter.

    `id` and `model`: what the provider calls the reply, and the model that gave it.
    """

    content: str | None
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage
    id: str | None = None
    model: str | None = None


class Model(Protocol):
    """A model provider."""

    async def complete(self, request: ModelRequest) -> ModelReply:
        """Ask once, without retries.

        Raises `ModelUnavailable` where another try may help, `ModelRefused` where it will not.
        """
        ...
