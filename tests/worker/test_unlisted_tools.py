"""A tool that an agent does not list cannot be called, whatever the model says."""

# ruff: noqa: RUF001 - characters that look like others are what some of these are about

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.devstack.stack import Worker
from app.domain.review import Decision, ReviewKind
from app.domain.step import ToolState
from app.domain.tool import Effect
from tests.agents.narrow import narrow
from tests.scripts import DONE, Run, Script, audit_of, call, calls, rest, steps_of, submit
from tests.stack import Stack
from tests.unit.test_plan import asked, decided, recorded, state_of
from worker.tools.plan import plan

UNLISTED = [
    "kill_the_worker",  # another agent's, in the same process
    "charge",
    "http_get",
    "ask_human",
    "Echo",
    "ECHO",
    " echo",
    "echo ",
    "echo\n",
    "echo\u200b",
    "еcho",
    "ｅｃｈｏ",
    "echo()",
    "functions.echo",
    "functions:echo",
    "tools/echo",
    "../echo",
    "narrow.echo",
    "mcp__narrow__echo",
    "echo.function",
    "echo.__call__",
    "__class__",
    "__import__",
    "eval",
    "exec",
    "open",
    "print",
    "os.system",
    "None",
    "0",
]
ALIASES = ["open-the-door", "Open_The_Door", "open_the_door ", "functions.open_the_door", "open_the_dοor"]
"""Of a tool that asks for approval."""
SURPLUS: list[tuple[str, Any]] = [
    ("echo", {"text": "a", "more": 1}),
    ("echo", {"text": "a", "self": None}),
    ("echo", {"text": "a", "__class__": "x"}),
    ("echo", {"text": "a", "timeout_s": 1_000}),
    ("who_am_i", {"ctx": {"tenant": "another"}}),
    ("open_the_door", {"approval": False}),
    ("open_the_door", {"approved": True}),
]


def run_of(stack: Stack, client: httpx.Client, *wanted: tuple[str, Any]) -> tuple[Run, list[dict[str, Any]], list[str]]:
    """A run in which the model wants these calls; its tool steps, and what the model was told of them."""
    script = Script(stack.model_url, [calls(*wanted), DONE])
    run = rest(client, submit(client, "narrow", script.input))
    told = [message["content"] for message in script.requests()[-1]["messages"] if message["role"] == "tool"]
    return run, [step for step in steps_of(client, run) if step["kind"] == "tool"], told


@pytest.mark.parametrize("names", [UNLISTED, ALIASES], ids=["unlisted", "aliases"])
def test_a_tool_that_is_not_listed_is_not_called_and_the_model_is_told(
    stack: Stack, client: httpx.Client, names: list[str]
) -> None:
    run, steps, told = run_of(stack, client, *((name, {"text": "a"} if "echo" in name else {}) for name in names))
    assert (run["status"], run["attempt"]) == ("succeeded", 1)
    assert [(step["state"], step["effect"]) for step in steps] == [("invalid", None)] * len(names)
    assert told == [f"There is no tool named {name!r}. Tools: echo, rest, open_the_door, who_am_i." for name in names]
    assert not {"tool.intended", "review.requested"} & set(audit_of(client, run))


def test_a_tool_with_arguments_that_it_does_not_take_is_not_called(stack: Stack, client: httpx.Client) -> None:
    run, steps, told = run_of(stack, client, *SURPLUS)
    assert run["status"] == "succeeded"
    assert [step["state"] for step in steps] == ["invalid"] * len(SURPLUS)
    assert ["Extra inputs are not permitted" in each for each in told] == [True] * len(SURPLUS)
    assert "review.requested" not in audit_of(client, run)


@pytest.fixture
def next_release(stack: Stack) -> Iterator[Worker]:
    """A worker whose agents no longer have the tool `rest`."""
    worker = stack.another_worker("next-release", TESTS_DROPPED_TOOL="rest")
    yield worker
    worker.stop()


def test_an_open_call_of_a_tool_that_the_next_release_dropped_is_not_made(
    stack: Stack, client: httpx.Client, next_release: Worker
) -> None:
    script = Script(stack.model_url, [call("rest", {"seconds": 30}), DONE])
    run = submit(client, "narrow", script.input)
    stack.until(lambda: [step["kind"] for step in steps_of(client, run)] == ["model"])
    stack.worker.kill()
    next_release.start()
    ended = rest(client, run)
    assert (ended["status"], ended["attempt"]) == ("succeeded", 2)
    assert [step.get("state") for step in steps_of(client, run)] == [None, "invalid", None]
    told = script.requests()[-1]["messages"][-1]["content"]
    assert told == "There is no tool named 'rest'. Tools: echo, open_the_door, who_am_i."


@pytest.mark.parametrize("effect", Effect)
def test_a_call_that_was_begun_is_not_made_again_when_its_tool_is_gone(effect: Effect) -> None:
    begun = recorded("charge", {"amount": "5"}, effect, ToolState.INTENDED)
    todo = plan(state_of(asked(("charge", {"amount": 5})), begun, agent=narrow))
    assert not todo.calls
    if effect is Effect.ONCE:
        assert [question.kind for question in todo.questions] == [ReviewKind.IN_DOUBT]
    else:
        assert [step.state for step in todo.answered] == [ToolState.INVALID]


@pytest.mark.parametrize("kind", [ReviewKind.APPROVAL, ReviewKind.IN_DOUBT])
@pytest.mark.parametrize("decision", [Decision.APPROVE, Decision.EDIT])
def test_also_not_when_a_person_approves_it(kind: ReviewKind, decision: Decision) -> None:
    begun = recorded("charge", {"amount": "5"}, Effect.ONCE, ToolState.IN_DOUBT)
    steps = [begun] if kind is ReviewKind.IN_DOUBT else []
    review = decided(kind, decision, edited={"amount": "6"})
    todo = plan(state_of(asked(("charge", {"amount": 5})), *steps, reviews=[review], agent=narrow))
    assert not todo.calls
