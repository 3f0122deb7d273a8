"""What to do with each open tool call, decided from what is recorded. Pure: nothing is called and nothing is written.

A call that was begun before (its intent is recorded, its result is not) is made again if its effect allows that:
READ always, IDEMPOTENT with the same key, ONCE never: a person is asked whether it happened.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, JsonValue, ValidationError

from app.domain.canonical import digest, storable
from app.domain.review import Decision, Review, ReviewKind, ReviewRequest, ReviewStatus
from app.domain.step import ToolState, ToolStep
from app.domain.tool import Effect, Tool
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
    calls: list[PlannedCall] = []
    answered: list[ToolStep] = []
    questions: list[ReviewRequest] = []
    for open_call in state.open_calls():
        match _decide(state, open_call):
            case PlannedCall() as call:
                calls.append(call)
            case ToolStep() as step:
                answered.append(step)
            case ReviewRequest() as question:
                questions.append(question)
    return Plan(calls, answered, questions)


def question(kind: ReviewKind, step: ToolStep) -> ReviewRequest:
    """Ask a person about this call."""
    return ReviewRequest(
        kind=kind,
        seq=step.seq,
        tool=step.tool,
        arguments=step.arguments,
        args_hash=digest({"tool": step.tool, "arguments": step.arguments}),
    )


def _decide(state: RunState, open_call: OpenCall) -> PlannedCall | ToolStep | ReviewRequest:
    review = state.reviews.get(open_call.seq)
    decided = review if review and review.status is ReviewStatus.DECIDED else None
    if open_call.step is not None and (settled := _settle_doubt(open_call.step, decided)) is not None:
        return settled

    tool = state.agent.tools_by_name.get(open_call.call.name)
    if tool is None:
        known = ", ".join(state.agent.tools_by_name) or "none"
        return _invalid(state, open_call, f"There is no tool named {open_call.call.name!r}. Tools: {known}.")
    if open_call.seq - _first_seq(state) >= MAX_CALLS_IN_A_REPLY:
        return _invalid(state, open_call, f"Not called: at most {MAX_CALLS_IN_A_REPLY} calls in one reply.")
    try:
        arguments = tool.arguments.model_validate_json(open_call.call.arguments or "{}")
    except ValidationError as error:
        return _invalid(state, open_call, f"The arguments do not fit: {explain(error, whole='arguments')}")

    step = _step(state, open_call, storable(arguments.model_dump(mode="json")), tool.effect, ToolState.INTENDED)
    if decided is not None:
        return _after_decision(decided, tool, arguments, step)
    return question(ReviewKind.APPROVAL, step) if tool.needs_approval(arguments) else PlannedCall(tool, arguments, step)


def _settle_doubt(begun: ToolStep, decided: Review | None) -> ToolStep | ReviewRequest | None:
    """A ONCE call was begun before: what follows without making it. None: it did not happen, so it may be made now.

    Only a decision on this very doubt settles it; making the call again begins a new one. The tool itself is not asked:
    it may have gone with a new version of the agent, what it did has not.
    """
    if begun.effect is not Effect.ONCE:
        return None
    if begun.state is not ToolState.IN_DOUBT or decided is None or decided.kind is not ReviewKind.IN_DOUBT:
        return question(ReviewKind.IN_DOUBT, begun)
    return None if decided.decision is Decision.APPROVE else _without_call(decided, begun)


def _after_decision(review: Review, tool: Tool, arguments: BaseModel, step: ToolStep) -> PlannedCall | ToolStep:
    if review.decision is Decision.APPROVE:
        return PlannedCall(tool, arguments, step)
    return _without_call(review, step)


def _without_call(review: Review, step: ToolStep) -> ToolStep:
    """The result that the model is given in place of a call that is not made."""
    if review.decision is Decision.RESPOND:
        return step.model_copy(update={"state": ToolState.SUCCEEDED, "result": review.response})
    why = f"A person rejected this call: {review.reason or 'no reason given'}"
    return step.model_copy(update={"state": ToolState.REJECTED, "result": why})


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
