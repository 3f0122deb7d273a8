"""Tool output is data: how the model sees it, and how much of it. On real servers."""

import re
from typing import Any

import httpx
import pytest

from app.domain.data import DATA_RULE, as_data
from tests.agents import toolbox
from tests.scripts import DONE, Script, call, calls, rest, say, steps_of, submit
from tests.stack import Stack
from tests.unit.test_data import ANY_MARKER, INJECTIONS

TEXTS = list(INJECTIONS.values())


def play(stack: Stack, client: httpx.Client, *replies: dict[str, Any], agent: str = "toolbox") -> list[dict[str, Any]]:
    """A run of these replies: the messages of its last request, as the model got them."""
    script = Script(stack.model_url, [*replies, DONE])
    run = rest(client, submit(client, agent, script.input))
    assert run["status"] == "succeeded"
    messages: list[dict[str, Any]] = script.requests()[-1]["messages"]
    return messages


@pytest.mark.parametrize("tool", ["echo", "refuse"])
def test_whatever_a_tool_says_stays_between_its_markers(stack: Stack, client: httpx.Client, tool: str) -> None:
    name = "text" if tool == "echo" else "why"
    system, _, _, *told = play(stack, client, calls(*((tool, {name: text}) for text in TEXTS)))
    assert system["content"] == f"{toolbox.instructions}\n\n{DATA_RULE}"
    assert len(told) == len(TEXTS)
    for message, text in zip(told, TEXTS, strict=True):
        content = message["content"]
        begin, *_, end = content.split("\n")
        assert re.fullmatch(rf'<data-[0-9a-f]{{16}} from="{tool}">', begin)
        assert end == f"</data-{begin[6:22]}>"
        assert ANY_MARKER.findall(content) == [begin, end]
        if len(text) < 20_000 and "<" not in text and "\uff1c" not in text:
            assert content == f"{begin}\n{text or ('The tool did not work.' if tool == 'refuse' else '')}\n{end}"


def test_a_result_is_stored_as_the_tool_gave_it(stack: Stack, client: httpx.Client) -> None:
    text = INJECTIONS["a whole block"]
    script = Script(stack.model_url, [call("echo", {"text": text}), DONE])
    run = rest(client, submit(client, "toolbox", script.input))
    assert steps_of(client, run)[1]["result"] == text


@pytest.mark.parametrize("tool", ["echo", "refuse"])
def test_a_result_and_an_error_are_bounded(stack: Stack, client: httpx.Client, tool: str) -> None:
    text = "x" * 50_000
    told = play(stack, client, call(tool, {"text" if tool == "echo" else "why": text}))[-1]["content"]
    assert told == as_data(tool, f"{'x' * 20_000}\n[cut: 50000 characters in all]")


def test_what_the_service_says_is_not_marked(stack: Stack, client: httpx.Client) -> None:
    wanted = calls(("crash", {}), ("dawdle", {"seconds": 9}), ("no_such_tool", {}), ("echo", {"more": 1}))
    *_, crash, dawdle, unknown, wrong = play(stack, client, wanted)
    assert crash["content"] == "The tool failed unexpectedly."
    assert dawdle["content"] == "The tool took too long."
    assert unknown["content"].startswith("There is no tool named 'no_such_tool'.")
    assert wrong["content"].startswith("The arguments do not fit: ")


def test_an_agent_without_tools_is_told_nothing_of_data(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [say("yes")])
    rest(client, submit(client, "hasty", script.input))
    assert script.requests()[0]["messages"][0] == {"role": "system", "content": "Answer."}


def test_a_run_that_is_resumed_shows_the_same_as_before(stack: Stack, client: httpx.Client) -> None:
    wanted = calls(("echo", {"text": "a"}), ("refuse", {"why": "b"}))
    script = Script(stack.model_url, [wanted, call("rest", {"seconds": 2}), DONE])
    run = submit(client, "toolbox", script.input)
    stack.until(lambda: len(steps_of(client, run)) == 4)
    stack.worker.kill()
    stack.worker.start()
    ended = rest(client, run)
    assert (ended["status"], ended["attempt"]) == ("succeeded", 2)
    _, before, after = (request["messages"] for request in script.requests())
    assert after[: len(before)] == before
    assert len(before) == 5
