"""What is done with each tool call, decided from the record."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, Field, computed_field

from app.domain.agent import Agent, Limits, OnExpiry
from app.domain.ids import new_id
from app.domain.review import Decision, Review, ReviewKind, ReviewQueue, ReviewStatus
from app.domain.run import Priority, Run, RunStatus, RunTime, RunUsage
from app.domain.step import ModelStep, Step, ToolCall, ToolState, ToolStep
from app.domain.tool import Effect, tool
from tests.agents import toolbox
from tests.agents.people import clerk
from worker.state import RunState
from worker.tools.plan import MAX_CALLS_IN_A_REPLY, Plan, plan

ASKED = datetime.now(UTC)
BEFORE = ASKED - timedelta(seconds=1)
AFTER = ASKED + timedelta(seconds=1)
FIVE = {"amount": "5"}

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
    time=RunTime(),
    created_at=ASKED,
    queued_at=ASKED,
    waiting_since=None,
    lost_since=None,
    running_since=ASKED,
    started_at=ASKED,
    ended_at=None,
    erased_at=None,
    request_id="r",
    traceparent=None,
    read_at=ASKED,
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


def state_of(*steps: Step, reviews: Sequence[Review] = (), agent: Agent = toolbox) -> RunState:
    """Where a run stands; the reviews are about its first call, oldest first."""
    return RunState(
        run=RUN,
        agent=agent,
        models=["m"],
        prices={"m": None},
        steps=list(steps),
        reviews={1: reviews},
        usage=RUN.usage,
    )


def recorded(tool: str, arguments: Any, effect: Effect, state: ToolState, *, at: datetime | None = BEFORE) -> ToolStep:
    """The first call as an earlier attempt left it; at no time: as this attempt did."""
    return ToolStep(
        seq=1,
        attempt=1,
        call_id="c0",
        tool=tool,
        arguments=arguments,
        effect=effect,
        state=state,
        idempotency_key=f"{RUN.id}:1",
        recorded_at=at,
    )


def decided(
    kind: ReviewKind,
    decision: Decision | None,
    *,
    arguments: Any = FIVE,
    edited: Any = None,
    reason: str | None = None,
    response: str | None = None,
    status: ReviewStatus = ReviewStatus.DECIDED,
) -> Review:
    return Review(
        id=new_id(),
        tenant="t",
        run_id=RUN.id,
        agent="toolbox",
        kind=kind,
        seq=1,
        tool="charge",
        arguments=arguments,
        args_hash="",
        why="",
        stop_reason=None,
        queue=ReviewQueue.FIRST,
        barred=(),
        on_expiry=OnExpiry.END,
        expires_s=60,
        edited=edited,
        status=status,
        decision=decision,
        reason=reason,
        response=response,
        decided_by="key:k",
        created_at=ASKED,
        decided_at=ASKED,
        expires_at=ASKED,
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


def test_only_a_decision_about_the_doubt_settles_it() -> None:
    for state in (ToolState.INTENDED, ToolState.IN_DOUBT):
        begun = recorded("charge", FIVE, Effect.ONCE, state)
        for kind in set(ReviewKind) - {ReviewKind.IN_DOUBT}:
            todo = plan(state_of(asked(CHARGE), begun, reviews=[decided(kind, Decision.APPROVE)]))
            assert not todo.calls
            assert [question.kind for question in todo.questions] == [ReviewKind.IN_DOUBT]


def test_a_call_that_was_begun_again_after_its_doubt_was_settled_is_in_doubt_again() -> None:
    begun = recorded("charge", FIVE, Effect.ONCE, ToolState.INTENDED)
    todo = plan(state_of(asked(CHARGE), begun, reviews=[decided(ReviewKind.IN_DOUBT, Decision.APPROVE)]))
    assert not todo.calls
    assert len(todo.questions) == 1


def test_a_doubt_is_settled_by_what_the_person_says() -> None:
    doubt = recorded("charge", {"amount": "5"}, Effect.ONCE, ToolState.IN_DOUBT)

    did_not_happen = plan(state_of(asked(CHARGE), doubt, reviews=[decided(ReviewKind.IN_DOUBT, Decision.APPROVE)]))
    assert len(did_not_happen.calls) == len(did_not_happen.intents) == 1

    happened = decided(ReviewKind.IN_DOUBT, Decision.RESPOND, response="charged as 17")
    answered = plan(state_of(asked(CHARGE), doubt, reviews=[happened])).answered
    assert [(step.state, step.result) for step in answered] == [(ToolState.SUCCEEDED, "charged as 17")]
    assert [step.from_person for step in answered] == [True]

    no = decided(ReviewKind.IN_DOUBT, Decision.REJECT, reason="it did not")
    answered = plan(state_of(asked(CHARGE), doubt, reviews=[no])).answered
    assert [step.state for step in answered] == [ToolState.REJECTED]
    assert "it did not" in (answered[0].result or "")

    edited = doubt.model_copy(update={"note": "A person changed the arguments."})
    answered = plan(state_of(asked(CHARGE), edited, reviews=[no])).answered
    assert [step.note for step in answered] == [None]


@pytest.mark.parametrize("recorded_at", [AFTER, None])
def test_a_decision_about_an_earlier_doubt_does_not_settle_that_of_the_call_made_after_it(
    recorded_at: datetime | None,
) -> None:
    again = recorded("charge", FIVE, Effect.ONCE, ToolState.IN_DOUBT, at=recorded_at)
    for decision in (Decision.APPROVE, Decision.RESPOND, Decision.REJECT):
        todo = plan(state_of(asked(CHARGE), again, reviews=[decided(ReviewKind.IN_DOUBT, decision)]))
        assert not todo.calls
        assert not todo.answered
        assert [question.kind for question in todo.questions] == [ReviewKind.IN_DOUBT]


def test_a_doubt_outlives_the_tool_that_caused_it() -> None:
    gone = recorded("a_tool_of_the_last_version", {"amount": "5"}, Effect.ONCE, ToolState.INTENDED)
    todo = plan(state_of(asked(("a_tool_of_the_last_version", {"amount": 5})), gone))
    assert not todo.answered
    assert [(question.kind, question.tool) for question in todo.questions] == [
        (ReviewKind.IN_DOUBT, "a_tool_of_the_last_version")
    ]


@pytest.mark.parametrize("status", [ReviewStatus.PENDING, ReviewStatus.VOID])
def test_a_review_that_is_not_decided_settles_nothing(status: ReviewStatus) -> None:
    undecided = decided(ReviewKind.APPROVAL, Decision.APPROVE, arguments={}, status=status)
    todo = plan(state_of(asked(("open_the_door", {})), reviews=[undecided]))
    assert not todo.calls
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


# -- what people decided


def to_clerk(call: tuple[str, Any], *reviews: Review) -> Plan:
    return plan(state_of(asked(call), reviews=reviews, agent=clerk))


def approval(decision: Decision | None, arguments: Any, **more: Any) -> Review:
    return decided(ReviewKind.APPROVAL, decision, arguments=arguments, **more)


REFUND = ("refund", {"order": "A", "amount": 60})
SIXTY = {"order": "A", "amount": "60"}
SEVENTY = {"order": "A", "amount": "70"}


def test_a_reviewer_is_told_why_a_call_was_stopped() -> None:
    (request,) = to_clerk(REFUND).questions
    assert request.why == "The tool refund asks for approval of calls like this one."
    assert (request.arguments, request.editor) == (SIXTY, None)
    (request,) = to_clerk(("announce", {"text": "hi"})).questions
    assert request.why == "The tool announce asks for approval of every call."


def test_a_reviewer_of_a_doubt_is_told_that_the_worker_may_be_alive() -> None:
    begun = recorded("charge", FIVE, Effect.ONCE, ToolState.INTENDED)
    (request,) = plan(state_of(asked(CHARGE), begun)).questions
    assert "its worker died, or the tool failed in the middle" in request.why
    assert "certain only when that worker is gone" in request.why


def test_an_approved_call_is_made_with_the_arguments_that_were_approved() -> None:
    (call,) = to_clerk(REFUND, approval(Decision.APPROVE, SEVENTY)).calls
    assert call.step.arguments == SEVENTY
    assert call.arguments.model_dump() == {"order": "A", "amount": 70}
    assert call.step.note is None


def test_a_call_that_did_not_happen_is_made_with_the_arguments_it_was_begun_with() -> None:
    edit = approval(Decision.EDIT, SIXTY, edited=SEVENTY)
    begun = recorded("refund", SEVENTY, Effect.ONCE, ToolState.IN_DOUBT)
    no = decided(ReviewKind.IN_DOUBT, Decision.APPROVE, arguments=SEVENTY)
    (call,) = plan(state_of(asked(REFUND), begun, reviews=[edit, no], agent=clerk)).calls
    assert call.step.arguments == SEVENTY
    assert call.step.note is not None


def test_an_edited_call_is_made_with_the_new_arguments_where_they_need_no_approval() -> None:
    for edited in ({"order": "A", "amount": "50"}, {"order": "A", "amount": 50}):
        todo = to_clerk(REFUND, approval(Decision.EDIT, SIXTY, edited=edited))
        assert not todo.questions
        assert todo.calls[0].step.arguments == {"order": "A", "amount": "50"}
        assert todo.calls[0].step.note == (
            'A person changed the arguments of this call to {"amount":"50","order":"A"}.'
        )


def test_an_edited_call_of_a_tool_that_wants_every_call_approved_is_made() -> None:
    edit = approval(Decision.EDIT, {"text": "hi"}, edited={"text": "hello"})
    (call,) = to_clerk(("announce", {"text": "hi"}), edit).calls
    assert call.step.arguments == {"text": "hello"}


def test_edited_arguments_that_need_approval_are_asked_about_again() -> None:
    edit = approval(Decision.EDIT, SIXTY, edited=SEVENTY)
    todo = to_clerk(REFUND, edit)
    assert not todo.calls
    (request,) = todo.questions
    assert (request.kind, request.arguments, request.editor) == (ReviewKind.APPROVAL, SEVENTY, "key:k")
    assert request.why.endswith("A person has changed its arguments.")
    assert request.args_hash != to_clerk(REFUND).questions[0].args_hash

    (call,) = to_clerk(REFUND, edit, approval(Decision.APPROVE, SEVENTY)).calls
    assert call.step.arguments == SEVENTY
    assert call.step.note is not None


def test_a_decision_about_the_arguments_before_an_edit_does_not_count_for_those_after_it() -> None:
    edit = approval(Decision.EDIT, SIXTY, edited=SEVENTY)
    pending = approval(None, SEVENTY, status=ReviewStatus.PENDING)
    todo = to_clerk(REFUND, edit, pending)
    assert not todo.calls
    assert len(todo.questions) == 1

    rejected = approval(Decision.REJECT, SEVENTY, reason="too much")
    todo = to_clerk(REFUND, edit, rejected)
    assert not todo.calls
    assert [step.state for step in todo.answered] == [ToolState.REJECTED]


def test_a_decision_of_another_kind_does_not_count() -> None:
    for kind in set(ReviewKind) - {ReviewKind.APPROVAL}:
        for decision in Decision:
            todo = to_clerk(REFUND, decided(kind, decision, arguments=SIXTY, edited=SIXTY, response="yes"))
            assert not todo.calls
            assert not todo.answered
            assert [question.kind for question in todo.questions] == [ReviewKind.APPROVAL]


@pytest.mark.parametrize(
    "review",
    [
        decided(ReviewKind.APPROVAL, Decision.APPROVE, arguments={"order": "A"}),
        decided(ReviewKind.APPROVAL, Decision.EDIT, arguments=SIXTY, edited={**SIXTY, "currency": "EUR"}),
    ],
)
def test_arguments_that_no_longer_fit_are_told_to_the_model(review: Review) -> None:
    todo = to_clerk(REFUND, review)
    assert not todo.calls
    (step,) = todo.answered
    assert step.state is ToolState.INVALID
    assert "the arguments that a person decided on do not fit" in (step.result or "")


@pytest.mark.parametrize("decision", [Decision.APPROVE, Decision.EDIT])
def test_a_call_of_a_tool_that_is_gone_is_not_made_whatever_a_person_decided(decision: Decision) -> None:
    todo = to_clerk(("gone", {}), approval(decision, {}, edited={}))
    assert not todo.calls
    (step,) = todo.answered
    assert (step.state, step.result and step.result[:30]) == (ToolState.INVALID, "There is no tool named 'gone'.")


def test_what_a_person_said_of_a_tool_that_is_gone_reaches_the_model() -> None:
    (step,) = to_clerk(("gone", {}), approval(Decision.REJECT, {}, reason="not today")).answered
    assert (step.state, step.effect) == (ToolState.REJECTED, None)
    assert "not today" in (step.result or "")


def test_a_call_that_nobody_decided_in_time_is_not_made() -> None:
    for kind, call, said in (
        (ReviewKind.APPROVAL, REFUND, "Not called: nobody approved this call in time."),
        (ReviewKind.QUESTION, ASK, "Nobody answered in time."),
    ):
        expired = decided(kind, None, arguments=SIXTY, status=ReviewStatus.EXPIRED)
        todo = to_clerk(call, expired)
        assert not todo.calls
        assert not todo.questions
        assert [(step.state, step.result) for step in todo.answered] == [(ToolState.REJECTED, said)]


def test_a_doubt_that_nobody_decided_in_time_stays_one() -> None:
    begun = recorded("charge", FIVE, Effect.ONCE, ToolState.IN_DOUBT)
    expired = decided(ReviewKind.IN_DOUBT, None, status=ReviewStatus.EXPIRED)
    todo = plan(state_of(asked(CHARGE), begun, reviews=[expired]))
    assert not todo.calls
    assert not todo.answered


class Parcel(BaseModel):
    """Its field is called otherwise outside, and it works something out."""

    weight: int = Field(alias="weightInGrams")

    @computed_field
    def is_heavy(self) -> bool:
        return self.weight > 10_000


@tool(approval=True)
async def ship(parcel: Parcel) -> str:
    """Ship a parcel; a person has to agree."""
    return f"shipped {parcel.weight}"


def test_what_a_person_is_shown_is_what_the_tool_takes() -> None:
    shipper = Agent(name="shipper", instructions="", tools=(ship,))
    reply = asked(("ship", {"parcel": {"weightInGrams": 5}}))
    (request,) = plan(state_of(reply, agent=shipper)).questions
    assert request.arguments == {"parcel": {"weightInGrams": 5}}
    (call,) = plan(state_of(reply, reviews=[approval(Decision.APPROVE, request.arguments)], agent=shipper)).calls
    assert call.step.arguments == request.arguments


# -- questions of the model

ASK = ("ask_human", {"question": "Which one?", "options": ["left", "right"]})


def test_a_question_of_the_model_goes_to_a_person() -> None:
    todo = to_clerk(ASK)
    assert not todo.calls
    (request,) = todo.questions
    assert (request.kind, request.why) == (ReviewKind.QUESTION, "Which one?")
    assert request.arguments == {"question": "Which one?", "options": ["left", "right"]}


def test_the_answer_of_a_person_is_the_result() -> None:
    (step,) = to_clerk(ASK, decided(ReviewKind.QUESTION, Decision.RESPOND, response="left")).answered
    assert (step.state, step.result, step.from_person) == (ToolState.SUCCEEDED, "left", True)
    (step,) = to_clerk(ASK, decided(ReviewKind.QUESTION, Decision.REJECT, reason="ask the customer")).answered
    assert (step.state, step.result) == (ToolState.REJECTED, "A person does not answer: ask the customer")


@pytest.mark.parametrize("decision", [Decision.APPROVE, Decision.EDIT])
@pytest.mark.parametrize("kind", ReviewKind)
def test_a_question_is_never_called(kind: ReviewKind, decision: Decision) -> None:
    arguments = {"question": "Which one?"}
    todo = to_clerk(ASK, decided(kind, decision, arguments=arguments, edited=arguments))
    assert not todo.calls
    assert [question.kind for question in todo.questions] == [ReviewKind.QUESTION]


@pytest.mark.parametrize(
    "arguments", [{}, {"question": " "}, {"question": "x" * 4_001}, {"question": "?", "options": []}]
)
def test_a_question_without_bounds_goes_back_to_the_model(arguments: Any) -> None:
    todo = to_clerk(("ask_human", arguments))
    assert not todo.questions
    assert [step.state for step in todo.answered] == [ToolState.INVALID]
