"""What is done with each tool call, decided from the record."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest

from app.domain.agent import Limits
from app.domain.ids import new_id
from app.domain.review import Decision, Review, ReviewKind, ReviewStatus
from app.domain.run import Priority, Run, RunStatus, RunUsage
from app.domain.step import ModelStep, Step, ToolCall, ToolState, ToolStep
from app.domain.tool import Effect
from tests.agents import toolbox
from worker.state import RunState
from worker.tools.plan import MAX_CALLS_IN_A_REPLY, plan

RUN = Run(
    id=UUID(int=7),
    tenant="t",
    agent="toolbox",
    agent_version="1",
    input="hello",
    metadata={},
    limits=Limits(),
    priority=Priority.NORMAL,
    status=RunStatus.RUNNING,
    stop_reason=None,
    output=None,
    error=None,
    usage=RunUsage(),
    attempt=2,
    active_ms=0,
    created_at=datetime.now(UTC),
    started_at=None,
    ended_at=None,
)


def asked(*calls: tuple[str, Any]) -> ModelStep:
    """A reply that asks for these tools with these arguments."""
    return ModelStep(
        seq=0,
        attempt=1,
        model="m",
        tool_calls=tuple(
            ToolCall(id=f"c{number}", name=name, arguments=text if isinstance(text, str) else json.dumps(text))
            for number, (name, text) in enumerate(calls)
        ),
    )


def state_of(*steps: Step, reviews: Sequence[Review] = ()) -> RunState:
    return RunState(
        run=RUN,
        agent=toolbox,
        models=["m"],
        prices={"m": None},
        steps=list(steps),
        reviews={review.seq: review for review in reviews},
        usage=RUN.usage,
    )


def recorded(tool: str, arguments: Any, effect: Effect, state: ToolState) -> ToolStep:
    return ToolStep(
        seq=1,
        attempt=1,
        call_id="c0",
        tool=tool,
        arguments=arguments,
        effect=effect,
        state=state,
        idempotency_key=f"{RUN.id}:1",
    )


def decided(kind: ReviewKind, decision: Decision, *, reason: str | None = None, response: str | None = None) -> Review:
    return Review(
        id=new_id(),
        tenant="t",
        run_id=RUN.id,
        agent="toolbox",
        kind=kind,
        seq=1,
        tool="charge",
        arguments={"amount": "5"},
        args_hash="",
        status=ReviewStatus.DECIDED,
        decision=decision,
        reason=reason,
        response=response,
        decided_by="key:k",
        created_at=datetime.now(UTC),
        decided_at=datetime.now(UTC),
        expires_at=datetime.now(UTC),
    )


CHARGE = ("charge", {"amount": 5})
TAG = ("tag", {"name": "x"})


def test_a_read_is_called_without_an_intent() -> None:
    todo = plan(state_of(asked(("echo", {"text": "a"}))))
    assert [call.step.tool for call in todo.calls] == ["echo"]
    assert todo.intents == []


@pytest.mark.parametrize("call", [CHARGE, TAG])
def test_an_unsafe_call_has_an_intent_and_a_key_that_is_the_same_on_every_attempt(call: tuple[str, Any]) -> None:
    todo = plan(state_of(asked(call)))
    assert [step.state for step in todo.intents] == [ToolState.INTENDED]
    assert todo.intents[0].idempotency_key == f"{RUN.id}:1"


def test_after_a_crash_a_read_and_an_idempotent_call_are_made_again() -> None:
    for call, effect in ((("echo", {"text": "a"}), Effect.READ), (TAG, Effect.IDEMPOTENT)):
        begun = recorded(call[0], call[1], effect, ToolState.INTENDED)
        todo = plan(state_of(asked(call), begun))
        assert [planned.step.idempotency_key for planned in todo.calls] == [begun.idempotency_key]


@pytest.mark.parametrize("state", [ToolState.INTENDED, ToolState.IN_DOUBT])
def test_after_a_crash_a_call_made_once_is_a_question_for_a_person(state: ToolState) -> None:
    todo = plan(state_of(asked(CHARGE), recorded("charge", {"amount": "5"}, Effect.ONCE, state)))
    assert not todo.calls
    assert [question.kind for question in todo.questions] == [ReviewKind.IN_DOUBT]


def test_an_approval_does_not_settle_a_doubt() -> None:
    begun = recorded("charge", {"amount": "5"}, Effect.ONCE, ToolState.INTENDED)
    for kind in ReviewKind:
        todo = plan(state_of(asked(CHARGE), begun, reviews=[decided(kind, Decision.APPROVE)]))
        assert not todo.calls
        assert len(todo.questions) == 1


def test_a_doubt_is_settled_by_what_the_person_says() -> None:
    doubt = recorded("charge", {"amount": "5"}, Effect.ONCE, ToolState.IN_DOUBT)

    did_not_happen = plan(state_of(asked(CHARGE), doubt, reviews=[decided(ReviewKind.IN_DOUBT, Decision.APPROVE)]))
    assert len(did_not_happen.calls) == len(did_not_happen.intents) == 1

    happened = decided(ReviewKind.IN_DOUBT, Decision.RESPOND, response="charged as 17")
    answered = plan(state_of(asked(CHARGE), doubt, reviews=[happened])).answered
    assert [(step.state, step.result) for step in answered] == [(ToolState.SUCCEEDED, "charged as 17")]

    no = decided(ReviewKind.IN_DOUBT, Decision.REJECT, reason="it did not")
    answered = plan(state_of(asked(CHARGE), doubt, reviews=[no])).answered
    assert [step.state for step in answered] == [ToolState.REJECTED]
    assert "it did not" in (answered[0].result or "")


def test_a_doubt_outlives_the_tool_that_caused_it() -> None:
    gone = recorded("a_tool_of_the_last_version", {"amount": "5"}, Effect.ONCE, ToolState.INTENDED)
    todo = plan(state_of(asked(("a_tool_of_the_last_version", {"amount": 5})), gone))
    assert not todo.answered
    assert [(question.kind, question.tool) for question in todo.questions] == [
        (ReviewKind.IN_DOUBT, "a_tool_of_the_last_version")
    ]


def test_a_pending_review_settles_nothing() -> None:
    pending = replace(decided(ReviewKind.APPROVAL, Decision.APPROVE), status=ReviewStatus.PENDING)
    todo = plan(state_of(asked(("open_the_door", {})), reviews=[pending]))
    assert [question.kind for question in todo.questions] == [ReviewKind.APPROVAL]


def test_only_the_calls_that_need_approval_wait() -> None:
    todo = plan(state_of(asked(("pay", {"amount": 50}), ("pay", {"amount": 51}), ("echo", {"text": "a"}))))
    assert [call.step.seq for call in todo.calls] == [1, 3]
    assert [question.seq for question in todo.questions] == [2]
    assert todo.questions[0].args_hash


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (("no_such_tool", {}), "There is no tool named 'no_such_tool'"),
        (("echo", {}), "text: Field required"),
        (("echo", {"text": "a", "more": 1}), "more: Extra inputs are not permitted"),
        (("echo", "{not json"), "Invalid JSON"),
        (("echo", "[1]"), "should be an object"),
    ],
)
def test_a_malformed_call_is_answered_with_what_is_wrong(call: tuple[str, Any], why: str) -> None:
    todo = plan(state_of(asked(call)))
    assert not todo.calls
    assert [step.state for step in todo.answered] == [ToolState.INVALID]
    assert why in (todo.answered[0].result or "")


def test_a_flood_of_calls_is_not_made() -> None:
    todo = plan(state_of(asked(*[("echo", {"text": str(uuid4())})] * (MAX_CALLS_IN_A_REPLY + 3))))
    assert len(todo.calls) == MAX_CALLS_IN_A_REPLY
    assert [step.state for step in todo.answered] == [ToolState.INVALID] * 3


def test_calls_with_a_result_are_not_made_again() -> None:
    done = recorded("echo", {"text": "a"}, Effect.READ, ToolState.SUCCEEDED)
    todo = plan(state_of(asked(("echo", {"text": "a"}), ("echo", {"text": "b"})), done))
    assert [call.step.seq for call in todo.calls] == [2]
