"""What the stand-in model server says when a test or a benchmark decides it: scripts, and the built-in bench script.

A script is chosen by the first user message that holds `script:<name>`, so tests that run at the same time never meet.
"""

import re
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from app.devstack.wire import Call, ChatRequest, Reply

_MARK = re.compile(r"script:(?P<script>[\w.-]+)|bench:(?P<calls>\d+):(?P<delay>\d+(?:\.\d+)?)")
REPLIES: TypeAdapter[list[Reply]] = TypeAdapter(list[Reply])


class ScriptError(Exception):
    """The request names a script that cannot answer it."""


@dataclass(slots=True)
class Script:
    """Replies in order, one a request, and the bodies of the requests that asked for them."""

    name: str
    replies: list[Reply]
    seen: list[bytes] = field(default_factory=list)

    def answer(self, body: bytes) -> Reply:
        """Raises `ScriptError` when there is no reply left."""
        self.seen.append(body)
        if len(self.seen) > len(self.replies):
            raise ScriptError(f"script {self.name} is exhausted")
        return self.replies[len(self.seen) - 1]


class Scripts:
    """The registered scripts. `name@model` answers that model's requests, `name` all others."""

    def __init__(self) -> None:
        self._scripts: dict[str, Script] = {}

    def register(self, name: str, replies: list[Reply]) -> None:
        """A script of the same name begins anew."""
        self._scripts[name] = Script(name, replies)

    def get(self, name: str) -> Script | None:
        return self._scripts.get(name)

    def answer(self, request: ChatRequest, body: bytes) -> Reply | None:
        """The scripted reply, or None where the request names no script.

        Raises `ScriptError`.
        """
        mark = _mark_in(request)
        if mark is None:
            return None
        name = mark["script"]
        if name is None:
            return _bench(request, calls=int(mark["calls"]), delay_s=float(mark["delay"]))
        script = self._scripts.get(f"{name}@{request.model}") or self._scripts.get(name)
        if script is None:
            raise ScriptError(f"script {name} is unknown")
        return script.answer(body)


def _mark_in(request: ChatRequest) -> re.Match[str] | None:
    for message in request.messages:
        if message.role == "user" and (mark := _MARK.search(message.text)):
            return mark
    return None


def _bench(request: ChatRequest, *, calls: int, delay_s: float) -> Reply:
    """`calls` model calls in all: each but the last asks for a call of one tool, in turns. Keeps no state."""
    turn = sum(message.role == "assistant" for message in request.messages)
    if turn < calls - 1 and request.tools:
        tool = request.tools[turn % len(request.tools)]
        call = Call(name=tool.function.name, arguments={"text": str(turn)})
        return Reply(tool_calls=[call], delay_s=delay_s)
    return Reply(content="done", delay_s=delay_s)
