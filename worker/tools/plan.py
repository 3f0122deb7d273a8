"""What to do with each open tool call, decided from what is recorded. Pure: nothing is called and nothing is written.

A call that was begun before (its intent is recorded, its result is not) is made again if its effect allows that:
READ always, IDEMPOTENT with the same key, ONCE never: a person is asked whether it happened.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, JsonValue, ValidationError

from app.domain.canonical import canonical_json, storable
from app.domain.review import Decision, Review, ReviewKind, ReviewRequest, ReviewStatus
from app.domain.step import ToolState, ToolStep
from app.domain.tool import Effect, Tool
from worker import questions
from worker.explain import explain
from worker.state import OpenCall, RunState

MAX_CALLS_IN_A_REPLY = 32
"""More calls than this in one reply are not made; the model is told."""


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A call that is to be made now; `step` is how it stands in the record until its result is there."""

    tool: Tool
    arguments: BaseModel
    step: ToolStep


@dataclass(frozen=True, slots=True)
class Plan:
    """`answered` needs no call: malformed, or decided by a person. `questions` need a person first."""

    calls: Sequence[PlannedCall] = field(default_factory=list)
    answered: Sequence[ToolStep] = field(default_factory=list)
    questions: Sequence[ReviewRequest] = field(default_factory=list)

    @property
    def intents(self) -> list[ToolStep]:
        """Committed before the calls are made, so that a crash in one of them is seen."""
        return [call.step for call in self.calls if call.step.effect is not Effect.READ]


def plan(state: RunState) -> Plan:
    """Decide for every open call of the last reply."""
    to_make: list[PlannedCall] = []
    answered: list[ToolStep] = []
    to_ask: list[ReviewRequest] = []
    for open_call in state.open_calls():
        match _decide(state, open_call):
            case PlannedCall() as call:
                to_make.append(call)
            case ToolStep() as step:
                answered.append(step)
            case ReviewRequest() as request:
                to_ask.append(request)
    return Plan(to_make, answered, to_ask)


def _decide(state: RunState, open_call: OpenCall) -> PlannedCall | ToolStep | ReviewRequest:
    asked = state.reviews.get(open_call.seq, ())
    latest = asked[-1] if asked else None
    begun = open_call.step
    if begun is not None and begun.effect is Effect.ONCE:
        # The tool itself is not asked: it may have gone with a new version of the agent, what it did has not.
        if latest is None or not _settles_doubt(latest, begun):
            return questions.in_doubt(begun)
        if latest.decision is not Decision.APPROVE:
            return _without_call(latest, begun, asked)
        return _propose(state, open_call, asked, agreed=latest)

    tool = state.agent.tools_by_name.get(open_call.call.name)
    kind = ReviewKind.QUESTION if tool and tool.asks_person else ReviewKind.APPROVAL
    settled = latest if latest and _is_settled(latest) and (tool is None or latest.kind is kind) else None
    if settled is not None and settled.decision not in (Decision.APPROVE, Decision.EDIT):
        step = _step(state, open_call, settled.arguments, tool.effect if tool else None, ToolState.INTENDED)
        return _without_call(settled, step, asked)
    return _propose(state, open_call, asked, agreed=settled)


def _propose(
    state: RunState, open_call: OpenCall, asked: Sequence[Review], *, agreed: Review | None
) -> PlannedCall | ToolStep | ReviewRequest:
    """Make the call as the model wants it or, where a person agreed to arguments, with those; or ask a person."""
    tool = state.agent.tools_by_name.get(open_call.call.name)
    if tool is None:
        known = ", ".join(state.agent.tools_by_name) or "none"
        return _invalid(state, open_call, f"There is no tool named {open_call.call.name!r}. Tools: {known}.")
    if open_call.seq - _first_seq(state) >= MAX_CALLS_IN_A_REPLY:
        return _invalid(state, open_call, f"Not called: at most {MAX_CALLS_IN_A_REPLY} calls in one reply.")
    text = open_call.call.arguments or "{}" if agreed is None else json.dumps(_agreed_arguments(agreed))
    try:
        arguments = tool.arguments.model_validate_json(text)
    except ValidationError as error:
        whose = "The arguments" if agreed is None else "Not called: the arguments that a person decided on"
        return _invalid(state, open_call, f"{whose} do not fit: {explain(error, whole='arguments')}")

    shown = storable(arguments.model_dump(mode="json", by_alias=True, round_trip=True))
    step = _step(state, open_call, shown, tool.effect, ToolState.INTENDED)
    if tool.asks_person:
        return questions.question(step)
    if _needs_approval(tool, arguments, agreed):
        editor = agreed.decided_by if agreed else None
        return questions.approval(tool, step, editor=editor)
    return PlannedCall(tool, arguments, step.model_copy(update={"note": _note(asked, shown)}))


def _needs_approval(tool: Tool, arguments: BaseModel, agreed: Review | None) -> bool:
    """What a person approved needs no more. What a person edited is asked about again where a predicate says so."""
    if agreed is None:
        return tool.needs_approval(arguments)
    return agreed.decision is Decision.EDIT and callable(tool.approval) and tool.needs_approval(arguments)


def _agreed_arguments(review: Review) -> JsonValue:
    """What is approved is what is executed, whatever this version of the tool would make of the model's text."""
    return review.edited if review.decision is Decision.EDIT else review.arguments


def _is_settled(review: Review) -> bool:
    """Is there an answer to go on with? That nobody gave one in time is an answer where the run goes on after it."""
    return review.status in (ReviewStatus.DECIDED, ReviewStatus.EXPIRED)


def _settles_doubt(review: Review, begun: ToolStep) -> bool:
    """Only a decision on this very doubt does: it was asked after what is recorded, not before the call was made again.

    A step of this attempt has no time of its record here yet, and is newer than every decision.
    """
    return (
        begun.state is ToolState.IN_DOUBT
        and review.kind is ReviewKind.IN_DOUBT
        and review.status is ReviewStatus.DECIDED
        and begun.recorded_at is not None
        and begun.recorded_at <= review.created_at
    )


def _without_call(review: Review, step: ToolStep, asked: Sequence[Review]) -> ToolStep:
    """The result that the model is given in place of a call that is not made."""
    if review.decision is Decision.RESPOND:
        said = {"result": review.response, "from_person": True, "note": _note(asked, step.arguments)}
        return step.model_copy(update={"state": ToolState.SUCCEEDED, **said})
    is_question = review.kind is ReviewKind.QUESTION
    if review.status is ReviewStatus.EXPIRED:
        why = "Nobody answered in time." if is_question else "Not called: nobody approved this call in time."
    else:
        did = "does not answer" if is_question else "rejected this call"
        why = f"A person {did}: {review.reason or 'no reason given'}"
    return step.model_copy(update={"state": ToolState.REJECTED, "result": why, "note": None})


def _note(asked: Sequence[Review], arguments: JsonValue) -> str | None:
    """What the model is told beside the result where it was not the call that it asked for."""
    if not any(review.decision is Decision.EDIT for review in asked):
        return None
    return f"A person changed the arguments of this call to {canonical_json(arguments)}."


def _invalid(state: RunState, open_call: OpenCall, why: str) -> ToolStep:
    step = _step(state, open_call, open_call.call.arguments, None, ToolState.INVALID)
    return step.model_copy(update={"result": why})


def _step(
    state: RunState, open_call: OpenCall, arguments: JsonValue, effect: Effect | None, tool_state: ToolState
) -> ToolStep:
    return ToolStep(
        seq=open_call.seq,
        attempt=state.run.attempt,
        call_id=open_call.call.id,
        tool=open_call.call.name,
        arguments=arguments,
        effect=effect,
        state=tool_state,
        idempotency_key=f"{state.run.id}:{open_call.seq}",
    )


def _first_seq(state: RunState) -> int:
    reply = state.last_reply
    assert reply is not None
    return reply.seq + 1
