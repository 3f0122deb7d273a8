"""What models, tools and people said, as a trace may show it: by the agent's `capture`, without secrets, bounded."""

import json
from collections.abc import Callable, Iterable, Sequence

from pydantic import JsonValue

from app.domain.agent import Capture
from app.domain.canonical import canonical_json, storable_text
from app.redaction import Redaction, hide_in
from worker.llm.base import Message, ModelReply

MAX_CHARS = 32_768
"""Of one text. What is longer is cut, and says so."""
MAX_CHARS_OF_MESSAGES = 131_072
"""Of a conversation: of a longer one the first messages and the latest are shown."""
_MARGIN = 1_024
"""Hidden beyond the cut as well, so that nothing is shown because its second half was cut off."""
_FIRST = 2


class Content:
    """Of one agent's runs. Every method gives None where nothing may be shown."""

    def __init__(self, capture: Capture, redaction: Redaction) -> None:
        self._is_shown = capture is not Capture.NONE
        self._hide = redaction.hide_secrets if capture is Capture.FULL else redaction.hide_personal

    def text(self, text: str | None) -> str | None:
        return self._shown(text) if self._is_shown and text is not None else None

    def value(self, value: JsonValue) -> str | None:
        """As JSON; text as it is."""
        if not self._is_shown:
            return None
        if isinstance(value, str):
            return self._shown(value)
        text = canonical_json(value)
        shown = self._shown(text)
        if shown == text or len(text) > MAX_CHARS:
            return shown
        return canonical_json(hide_in(value, self._hide))  # part by part, so that it is JSON still

    def instructions(self, text: str) -> str:
        """As the semantic conventions have it. Only where content is shown."""
        return _dump([_text_part(self._shown(text))])

    def reply(self, reply: ModelReply) -> str | None:
        """A model's reply, as the list of one message."""
        if not self._is_shown:
            return None
        message = Message(role="assistant", content=reply.content, tool_calls=reply.tool_calls)
        return _dump([{**self._message(message), "finish_reason": reply.finish_reason}])

    def message(self, message: Message) -> str:
        """One message of a conversation, as JSON. Only where content is shown."""
        return _dump(self._message(message))

    @property
    def is_shown(self) -> bool:
        return self._is_shown

    def _message(self, message: Message) -> dict[str, JsonValue]:
        if message.tool_call_id is not None:
            response: JsonValue = self._shown(message.content or "")
            parts: list[JsonValue] = [
                {"type": "tool_call_response", "id": self._shown(message.tool_call_id), "response": response}
            ]
            return {"role": message.role, "parts": parts}
        parts = [_text_part(self._shown(message.content))] if message.content else []
        for call in message.tool_calls:
            said = {"id": call.id, "name": call.name, "arguments": call.arguments}
            parts.append({"type": "tool_call", **{name: self._shown(text) for name, text in said.items()}})
        return {"role": message.role, "parts": parts}

    def _shown(self, text: str) -> str:
        shown = self._hide(storable_text(text[: MAX_CHARS + _MARGIN]))
        if len(text) <= MAX_CHARS:
            return shown
        return f"{shown[:MAX_CHARS]}\n[cut: {len(text)} characters in all]"


class Conversation:
    """The messages of a run so far. Each is made showable once, although every model call shows all of them."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._known: list[tuple[Message, str]] = []
        self._told: tuple[str, str] | None = None

    def instructions(self, messages: Sequence[Message]) -> str | None:
        """What the model is told first, as JSON."""
        if not self._content.is_shown:
            return None
        text = "\n\n".join(message.content or "" for message in messages if message.role == "system")
        if self._told is None or self._told[0] != text:
            self._told = text, self._content.instructions(text)
        return self._told[1]

    def shown(self, messages: Sequence[Message]) -> str | None:
        """All of them as JSON, but for the instructions."""
        if not self._content.is_shown:
            return None
        said = [message for message in messages if message.role != "system"]
        texts: list[str] = []
        for place, message in enumerate(said):
            if place >= len(self._known) or self._known[place][0] != message:
                self._known[place:] = [(message, self._content.message(message))]
            texts.append(self._known[place][1])
        return f"[{','.join(_bounded(texts))}]"


def input_message(shown: str | None) -> str | None:
    """A run's input that may be shown so, as the list of the one message that it is."""
    return None if shown is None else _dump([{"role": "user", "parts": [_text_part(shown)]}])


def output_message(shown: str | None) -> str | None:
    """A run's output, the same."""
    if shown is None:
        return None
    return _dump([{"role": "assistant", "parts": [_text_part(shown)], "finish_reason": "stop"}])


def _bounded(texts: Sequence[str]) -> Iterable[str]:
    if sum(map(len, texts)) <= MAX_CHARS_OF_MESSAGES:
        return texts
    left = MAX_CHARS_OF_MESSAGES - sum(map(len, texts[:_FIRST]))
    latest: list[str] = []
    for text in reversed(texts[_FIRST:]):
        left -= len(text)
        if left < 0:
            break
        latest.append(text)
    cut = len(texts) - _FIRST - len(latest)
    omitted = _dump({"role": "user", "parts": [_text_part(f"[{cut} messages are not shown here]")]})
    return [*texts[:_FIRST], omitted, *reversed(latest)]


def _text_part(text: str) -> JsonValue:
    return {"type": "text", "content": text}


_dump: Callable[[JsonValue], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
