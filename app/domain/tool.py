"""What a tool is: `@tool` turns a function into one, its JSON schema made from signature, types and docstring."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol, get_type_hints, overload
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, create_model


class Effect(StrEnum):
    """What calling a tool does to the world, and so what may be done after a crash."""

    READ = "read"
    """Changes nothing: may be called again."""
    IDEMPOTENT = "idempotent"
    """May be called again with the same `ctx.idempotency_key`; the other side does it once."""
    ONCE = "once"
    """Never called again by the service: when its outcome is unknown, a person is asked."""


class Database(Protocol):
    """Read access for tools that need the service's Postgres."""

    async def fetch_all(self, sql: str, parameters: Mapping[str, object]) -> Sequence[Mapping[str, Any]]:
        """Rows of one statement; parameters are written `:name`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpReply:
    """What another server answered. `url`: where the answer came from, after redirects. `body` is not compressed.

    `retry_after`: the header of that name, as it was sent; empty where there was none.
    """

    status: int
    url: str
    content_type: str
    body: bytes
    retry_after: str = ""


class Http(Protocol):
    """Outgoing HTTP for tools: nothing but what the agent allows, and nothing that is not on the public internet."""

    async def get(
        self,
        url: str,
        *,
        allow: Sequence[str],
        headers: Mapping[str, str] | None = None,
        max_bytes: int = 1_000_000,
        timeout_s: float = 20.0,
    ) -> HttpReply:
        """GET, following redirects. `allow`: hosts such as `api.example.com` or `*.example.com`, each with a port where
        it is not 443. `max_bytes`: of the answer, decompressed.

        Raises `EgressRefused`, and `ToolError` where the other server does not answer.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext:
    """What a tool may know about the run that calls it. A tool asks for it by a parameter of this type.

    `idempotency_key` is stable for run, step and call: the same on every attempt.
    `deadline` is when the run's time is over (UTC).
    """

    run_id: UUID
    tenant: str
    attempt: int
    deadline: datetime
    idempotency_key: str
    db: Database
    http: Http


Approval = bool | Callable[[Any], bool]
"""True, or a predicate of the validated arguments: does a person have to approve this call?"""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that a model may call.

    `timeout_s`: seconds for one call. `max_result_chars`: a longer result is cut, and says so.
    `asks_person`: it is never called; its argument `question` is put to a person, and the answer is its result.
    """

    name: str
    description: str
    function: Callable[..., Any]
    arguments: type[BaseModel]
    context_parameter: str | None
    effect: Effect = Effect.READ
    approval: Approval = False
    timeout_s: float = 30.0
    max_result_chars: int = 20_000
    asks_person: bool = False

    @cached_property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the arguments."""
        schema = self.arguments.model_json_schema()
        schema.pop("title", None)
        return schema

    def needs_approval(self, arguments: BaseModel) -> bool:
        return self.approval(arguments) if callable(self.approval) else self.approval


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *,
    name: str | None = None,
    effect: Effect = Effect.READ,
    approval: Approval = False,
    timeout_s: float = 30.0,
    max_result_chars: int = 20_000,
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    effect: Effect = Effect.READ,
    approval: Approval = False,
    timeout_s: float = 30.0,
    max_result_chars: int = 20_000,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a tool of an async or plain function; a plain one runs in a bounded thread pool.

    The docstring's first paragraphs are what the model reads; a Google-style `Args:` section describes the parameters.
    Raises `TypeError` for a parameter without a type.
    """

    def make(function: Callable[..., Any]) -> Tool:
        description, parameters = _read_docstring(inspect.getdoc(function) or "")
        tool_name = name or function.__name__
        if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", tool_name):
            raise TypeError(f"tool name {tool_name!r}: use letters, digits, '-' and '_', at most 64")
        arguments, context_parameter = _arguments_model(function, parameters)
        return Tool(
            name=tool_name,
            description=description,
            function=function,
            arguments=arguments,
            context_parameter=context_parameter,
            effect=effect,
            approval=approval,
            timeout_s=timeout_s,
            max_result_chars=max_result_chars,
        )

    return make if function is None else make(function)


def _arguments_model(
    function: Callable[..., Any], descriptions: Mapping[str, str]
) -> tuple[type[BaseModel], str | None]:
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    context_parameter = None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"tool {function.__name__}: parameter {parameter.name} must be a named one")
        if parameter.name not in hints:
            raise TypeError(f"tool {function.__name__}: parameter {parameter.name} has no type")
        if hints[parameter.name] is ToolContext:
            context_parameter = parameter.name
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (
            hints[parameter.name],
            Field(default, description=descriptions.get(parameter.name)),
        )
    model = create_model(f"{function.__name__}_arguments", __config__=ConfigDict(extra="forbid"), **fields)
    return model, context_parameter


def _read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """The text before `Args:`, and the description of each parameter in that section."""
    text, _, rest = doc.partition("\nArgs:\n")
    parameters: dict[str, str] = {}
    current = None
    for line in rest.splitlines():
        if match := re.match(r"\s+(\w+)(?: \(.*?\))?:\s+(.*)", line):
            current = match[1]
            parameters[current] = match[2].strip()
        elif current and line.startswith(" ") and line.strip():
            parameters[current] += " " + line.strip()
        else:
            current = None
    return text.strip(), parameters
