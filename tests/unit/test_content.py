"""What of a conversation goes into a trace: as much as the agent allows, without secrets, never without end."""

import json
from typing import Any

import pytest

from app.domain.agent import Capture
from app.domain.step import ToolCall, Usage
from app.redaction import Redaction
from worker.content import MAX_CHARS, MAX_CHARS_OF_MESSAGES, Content, Conversation, input_message, output_message
from worker.llm.base import Message, ModelReply

SECRET = "the-password-of-the-database"
TEXT = f"write to ada@example.com with {SECRET}"


def content(capture: Capture) -> Content:
    return Content(capture, Redaction([SECRET]))


def user(text: str) -> Message:
    return Message(role="user", content=text)


def parts(shown: str | None) -> Any:
    assert shown is not None
    return [part for message in json.loads(shown) for part in message["parts"]]


@pytest.mark.parametrize(
    ("capture", "shown"),
    [
        (Capture.FULL, "write to ada@example.com with [hidden]"),
        (Capture.REDACTED, "write to [email] with [hidden]"),
        (Capture.NONE, None),
    ],
)
def test_an_agent_decides_how_much_is_shown_but_never_the_services_own_secrets(
    capture: Capture, shown: str | None
) -> None:
    assert content(capture).text(TEXT) == shown
    assert content(capture).value({"a": [TEXT]}) == (
        None if shown is None else json.dumps({"a": [shown]}, separators=(",", ":"))
    )


def test_a_value_is_json_still_when_something_of_it_is_hidden() -> None:
    shown = content(Capture.REDACTED).value({"card": 4111111111111111, "to": "ada@example.com"})
    assert json.loads(shown or "") == {"card": "[card]", "to": "[email]"}


def test_where_nothing_is_captured_nothing_is_shown_in_any_way() -> None:
    nothing = content(Capture.NONE)
    reply = ModelReply(content=TEXT, tool_calls=(), finish_reason="stop", usage=Usage())
    assert input_message(nothing.value(TEXT)) is None
    assert output_message(nothing.value(TEXT)) is None
    assert nothing.reply(reply) is None
    assert Conversation(nothing).shown([user(TEXT)]) is None
    assert Conversation(nothing).instructions([Message(role="system", content=TEXT)]) is None


def test_messages_have_the_form_of_the_semantic_conventions() -> None:
    call = ToolCall(id="c1", name="echo", arguments='{"text": "ada@example.com"}')
    shown = Conversation(content(Capture.REDACTED)).shown(
        [
            Message(role="system", content="Be brief."),
            user("hello"),
            Message(role="assistant", content=None, tool_calls=(call,)),
            Message(role="tool", content="ada@example.com", tool_call_id="c1"),
        ]
    )
    assert shown is not None
    assert json.loads(shown) == [
        {"role": "user", "parts": [{"type": "text", "content": "hello"}]},
        {
            "role": "assistant",
            "parts": [{"type": "tool_call", "id": "c1", "name": "echo", "arguments": '{"text": "[email]"}'}],
        },
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "[email]"}]},
    ]


def test_a_reply_says_why_it_ended() -> None:
    reply = ModelReply(content="yes", tool_calls=(), finish_reason="length", usage=Usage())
    shown = content(Capture.FULL).reply(reply)
    assert json.loads(shown or "") == [
        {"role": "assistant", "parts": [{"type": "text", "content": "yes"}], "finish_reason": "length"}
    ]


def test_a_conversation_that_has_changed_is_not_shown_as_it_was() -> None:
    conversation = Conversation(content(Capture.FULL))
    conversation.shown([user("one"), user("two"), user("three")])
    assert [part["content"] for part in parts(conversation.shown([user("one"), user("other")]))] == ["one", "other"]


def test_a_long_text_is_cut_and_no_secret_is_left_that_the_cut_went_through() -> None:
    before = "x" * (MAX_CHARS - 5)
    shown = content(Capture.FULL).text(f"{before}{SECRET}{'y' * 10_000}")
    assert shown is not None
    assert SECRET[:5] not in shown
    assert shown.endswith(f"[cut: {len(before) + len(SECRET) + 10_000} characters in all]")
    assert len(shown) < MAX_CHARS + 100


def test_text_that_cannot_be_encoded_is_shown_as_far_as_it_can() -> None:
    assert content(Capture.FULL).text("a \ud800 b") == "a \ufffd b"


def test_of_a_long_conversation_the_beginning_and_the_end_are_shown() -> None:
    messages = [user(f"{number} {'x' * 9_000}") for number in range(50)]
    shown = Conversation(content(Capture.FULL)).shown(messages)
    assert shown is not None
    assert len(shown) < MAX_CHARS_OF_MESSAGES + 1_000
    texts = [part["content"].partition(" x")[0] for part in parts(shown)]
    left = [int(text) for text in texts if text.isdigit()]
    assert left[:2] == [0, 1]
    assert left[2:] == list(range(50 - len(left[2:]), 50))
    assert texts[2] == f"[{50 - len(left)} messages are not shown here]"
