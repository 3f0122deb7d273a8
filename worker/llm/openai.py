"""The OpenAI SDK behind the `Model` protocol: any server of chat completions. The only file that imports the SDK."""

import asyncio
import json
import math
from functools import lru_cache
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import openai
from openai import AsyncOpenAI, DefaultAioHttpClient
from pydantic import BaseModel, Field, ValidationError

from app.domain.canonical import storable_text
from app.domain.errors import ModelRefused, ModelUnavailable
from app.domain.step import ToolCall, Usage
from app.domain.tool import Tool
from worker.llm.base import Message, ModelReply, ModelRequest

_RETRIED_STATUSES = frozenset({408, 409, 425, 429})


class OpenAIModel:
    """One client and connection pool for all runs of the process. The SDK's own retries are off: `retry` does that."""

    def __init__(self, *, api_key: str, base_url: str | None) -> None:
        self._client = AsyncOpenAI(
            api_key=api_key, base_url=base_url, max_retries=0, http_client=DefaultAioHttpClient()
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.close()

    async def complete(self, request: ModelRequest) -> ModelReply:
        try:
            # The SDK's timeout is one for each read: a reply that drips in would never reach it.
            async with asyncio.timeout(request.timeout_s):
                completion = await self._client.post(
                    "/chat/completions",
                    body=_wire_request(request),
                    cast_to=object,  # as parsed JSON; the SDK would build objects from it without validating
                    options={"timeout": request.timeout_s},
                )
        except TimeoutError as error:
            raise ModelUnavailable(f"{request.model}: no reply within {request.timeout_s:.1f} s") from error
        except openai.APIStatusError as error:
            message = f"{request.model}: HTTP {error.status_code}: {error.message}"
            if error.status_code in _RETRIED_STATUSES or error.status_code >= 500:
                raise ModelUnavailable(message, retry_after=_retry_after(error)) from error
            raise ModelRefused(message) from error
        except (openai.APIConnectionError, openai.APIResponseValidationError, json.JSONDecodeError) as error:
            raise ModelUnavailable(f"{request.model}: {type(error).__name__}: {error}") from error
        return _reply(request.model, completion)


class _Function(BaseModel):
    name: str
    arguments: str = ""


class _Call(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: _Function


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _InputDetails(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _InputDetails | None = None


class _Completion(BaseModel):
    """Of a chat completion, what is used here. Whatever else a server sends is ignored."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None
    id: str | None = None
    model: str | None = None


def _reply(model: str, answer: object) -> ModelReply:
    try:
        completion = _Completion.model_validate(answer)
    except ValidationError as error:
        # A proxy's error page, or half an answer: another try may give a whole one.
        raise ModelUnavailable(f"{model}: not a chat completion ({error.error_count()} errors)") from error
    choice, usage = completion.choices[0], completion.usage or _Usage()
    content = choice.message.content or choice.message.refusal
    return ModelReply(
        content=storable_text(content) if content else None,
        tool_calls=tuple(
            ToolCall(
                id=storable_text(call.id),
                name=storable_text(call.function.name),
                arguments=storable_text(call.function.arguments),
            )
            for call in choice.message.tool_calls or ()
        ),
        finish_reason=choice.finish_reason or "stop",
        usage=Usage(
            input_tokens=usage.prompt_tokens,
            cached_tokens=(usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens) or 0,
            output_tokens=usage.completion_tokens,
        ),
        id=completion.id,
        model=completion.model,
    )


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds, from `Retry-After` in its numeric form (providers do not send the date form)."""
    try:
        seconds = float(error.response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _wire_request(request: ModelRequest) -> dict[str, Any]:
    """The request's body, posted as it is.

    `chat.completions.create` would walk through the whole transcript, looking for fields to rename, of which there are
    none: that took more CPU than all the rest of the call.
    """
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [_wire_message(message) for message in request.messages],
        "max_completion_tokens": request.max_output_tokens,
    }
    if request.tools:
        body["tools"] = [_wire_tool(tool) for tool in request.tools]
    if request.output is not None:
        body["response_format"] = _wire_output(request.output)
    return body


def _wire_message(message: Message) -> dict[str, Any]:
    wire: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        wire["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        wire["tool_call_id"] = message.tool_call_id
    return wire


def _wire_tool(tool: Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": tool.schema},
    }


@lru_cache(maxsize=1_000)
def _wire_output(output: type[BaseModel]) -> dict[str, Any]:
    # Not `strict`: that allows only a subset of JSON schema, and the answer is validated here anyway.
    return {"type": "json_schema", "json_schema": {"name": output.__name__, "schema": output.model_json_schema()}}
