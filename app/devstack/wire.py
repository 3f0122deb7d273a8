"""The wire protocol of OpenAI chat completions, from the server's side: requests read, replies and errors written.

Only what this project's client sends is looked at; everything else is accepted and ignored, as new fields come often.
"""

import json
import time
from collections.abc import Iterator
from secrets import token_hex
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

_BYTES_PER_TOKEN = 4
_CACHED_FROM, _CACHED_BY = 1024, 128
"""Tokens: a prompt is cached from this length on, and in steps of this length."""
_JSON = json.JSONEncoder(separators=(",", ":"), check_circular=False)  # made once: `json.dumps` makes one a call
_PIECE = 24
"""Characters in one streamed chunk."""


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    function: FunctionCall


class Part(BaseModel):
    """A part of a message's content; those that are not text are ignored."""

    type: str
    text: str = ""


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class Function(BaseModel):
    name: str
    description: str = ""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)


class ToolSpec(BaseModel):
    function: Function


class JsonSchema(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request, as far as the stand-in looks at it."""

    model: str = Field(min_length=1)
    messages: list[Message] = Field(min_length=1)
    tools: list[ToolSpec] = Field(default_factory=list)
    tool_choice: JsonValue = None
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


def problem_of(messages: list[Message]) -> str | None:
    """What is wrong with the order of the messages: each tool call needs its result right after it, and only that."""
    awaited: set[str] = set()
    for message in messages:
        if message.role == "tool":
            if message.tool_call_id not in awaited:
                return "messages with role 'tool' must be a response to a preceding message with 'tool_calls'"
            awaited.discard(message.tool_call_id)
        elif awaited:
            break
        elif message.tool_calls:
            awaited = {call.id for call in message.tool_calls}
    if awaited:
        missing = ", ".join(sorted(awaited))
        return f"'tool_calls' must be followed by a tool message for each 'tool_call_id'; there is none for {missing}"
    return None


class Call(BaseModel):
    """A tool call of a reply. Arguments given as text go out as they are, valid JSON or not."""

    model_config = ConfigDict(extra="forbid")

    name: str
    arguments: dict[str, JsonValue] | str = Field(default_factory=dict)

    @property
    def arguments_text(self) -> str:
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments, ensure_ascii=False)


Fault = Annotated[str, Field(pattern=r"^(status:[45]\d\d|stall|truncated|bad_json|disconnect|slow_drip)$")]
"""How an answer fails: as a provider's do, or a network's."""


class Usage(BaseModel):
    """Tokens; the cached ones are part of the prompt's."""

    model_config = ConfigDict(extra="forbid")

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Reply(BaseModel):
    """What the model says, and how the server behaves while it says it.

    `usage`: None means a guess from the sizes. `delay_s`: seconds before the first byte.
    `retry_after`: the header of a `status:` fault.
    """

    model_config = ConfigDict(extra="forbid")

    content: str | None = None
    tool_calls: list[Call] = Field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    delay_s: float = Field(0, ge=0)
    fault: Fault | None = None
    retry_after: str | None = None

    @property
    def finished_because(self) -> str:
        return self.finish_reason or ("tool_calls" if self.tool_calls else "stop")


def guess_usage(request: ChatRequest, reply: Reply, request_bytes: int) -> Usage:
    """Tokens from sizes, schemas included; what the model was sent in its previous turn already counts as cached."""
    said = len(reply.content or "") + sum(len(call.name) + len(call.arguments_text) for call in reply.tool_calls)
    new = 0
    for message in reversed(request.messages):
        new += len(message.text)
        if message.role == "assistant":
            seen_before = (request_bytes - new) // _BYTES_PER_TOKEN
            break
    else:
        seen_before = 0
    return Usage(
        prompt_tokens=request_bytes // _BYTES_PER_TOKEN + 1,
        completion_tokens=said // _BYTES_PER_TOKEN + 1,
        cached_tokens=seen_before // _CACHED_BY * _CACHED_BY if seen_before >= _CACHED_FROM else 0,
    )


class Completion:
    """A reply in the form in which it is sent: at once, or as chunks."""

    def __init__(self, request: ChatRequest, reply: Reply, *, request_bytes: int) -> None:
        self.is_stream = request.stream
        self._reply = reply
        self._include_usage = request.stream_options is not None and request.stream_options.include_usage
        self._head = {"id": f"chatcmpl-{token_hex(12)}", "created": int(time.time()), "model": request.model}
        self._tool_calls: list[dict[str, Any]] = [
            {
                "id": f"call_{token_hex(12)}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_text},
            }
            for call in reply.tool_calls
        ]
        self._usage = reply.usage or guess_usage(request, reply, request_bytes)

    def encode(self) -> bytes:
        """The whole reply as one JSON document."""
        message: dict[str, Any] = {"role": "assistant", "content": self._reply.content, "refusal": None}
        if self._tool_calls:
            message["tool_calls"] = self._tool_calls
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._reply.finished_because}
        return _encode({**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage_block()})

    def events(self) -> Iterator[bytes]:
        """The reply as server-sent events: role, pieces of text and arguments, the end, and usage where asked for."""
        yield self._event({"role": "assistant", "content": None if self._tool_calls else ""})
        for piece in _pieces(self._reply.content or ""):
            yield self._event({"content": piece})
        for index, call in enumerate(self._tool_calls):
            function = call["function"]
            yield self._event({"tool_calls": [{**call, "index": index, "function": {**function, "arguments": ""}}]})
            for piece in _pieces(function["arguments"]):
                yield self._event({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
        yield self._event({}, self._reply.finished_because)
        if self._include_usage:
            yield self._chunk([], self._usage_block())
        yield b"data: [DONE]\n\n"

    def _event(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}], None)

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        chunk: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._include_usage:
            chunk["usage"] = usage
        return b"data: " + _encode(chunk) + b"\n\n"

    def _usage_block(self) -> dict[str, Any]:
        usage = self._usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }


_ERROR_TYPES = {401: ("authentication_error", "invalid_api_key"), 429: ("requests", "rate_limit_exceeded")}


def error_body(status: int, message: str) -> bytes:
    """OpenAI's error shape."""
    kind, code = _ERROR_TYPES.get(status, ("invalid_request_error" if status < 500 else "server_error", None))
    return _encode({"error": {"message": message, "type": kind, "param": None, "code": code}})


def _encode(value: object) -> bytes:
    return _JSON.encode(value).encode()


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _PIECE):
        yield text[start : start + _PIECE]
