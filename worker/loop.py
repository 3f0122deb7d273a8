"""The agent loop: ask the model, make the calls it asks for, until it answers, a limit says stop or a person is needed.

The loop decides; everything it touches comes in as a `Journal` (what is recorded), an `Asker` (the model) and a
`Caller` (the tools). It keeps nothing of its own: a resumed run enters here like a new one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import JsonValue

from app.domain.review import ReviewRequest
from app.domain.run import RunUsage, StopReason
from app.domain.step import ModelStep, Step, ToolState, ToolStep
from worker import questions
from worker.limits import escalation, exceeded
from worker.llm.retry import Answer
from worker.output import correction, read_output
from worker.state import RunState
from worker.tools.plan import PlannedCall, plan


@dataclass(frozen=True, slots=True)
class Answered:
    """The model gave its final answer."""

    output: JsonValue


@dataclass(frozen=True, slots=True)
class Stopped:
    """It ends without an answer."""

    reason: StopReason


@dataclass(frozen=True, slots=True)
class Suspended:
    """It goes on when people have decided."""

    reviews: Sequence[ReviewRequest]


@dataclass(frozen=True, slots=True)
class HandedBack:
    """This worker is going away; another one goes on."""


Outcome = Answered | Stopped | Suspended | HandedBack

NOTHING = RunUsage()
"""What a step that asks no model uses."""


class Journal(Protocol):
    """Where steps are recorded, each call one commit."""

    async def record(self, steps: Sequence[Step], used: RunUsage) -> None:
        """Raises `LeaseLost`."""
        ...


class Asker(Protocol):
    """Asks the model for the next reply."""

    async def ask(self, state: RunState) -> Answer:
        """Raises `ModelError`."""
        ...


class Caller(Protocol):
    """Makes tool calls."""

    async def make(self, state: RunState, calls: Sequence[PlannedCall], results: list[ToolStep]) -> None:
        """Add the result of each call as it comes."""
        ...


async def run_loop(
    state: RunState, *, journal: Journal, asker: Asker, caller: Caller, draining: Callable[[], bool]
) -> Outcome:
    """Take steps until the run comes to rest."""
    while True:
        if state.answer is not None:
            return Answered(read_output(state.agent, state.answer.content))
        if (reason := exceeded(state)) is not None:
            return stopped_by(reason, state)
        if draining():
            return HandedBack()
        if reviews := await take_step(state, journal=journal, asker=asker, caller=caller):
            return Suspended(reviews)


def stopped_by(reason: StopReason, state: RunState) -> Outcome:
    """A limit is reached: the run ends, or waits for a person who may raise it."""
    request = escalation(state, reason)
    return Stopped(reason) if request is None else Suspended([request])


async def take_step(state: RunState, *, journal: Journal, asker: Asker, caller: Caller) -> Sequence[ReviewRequest]:
    """Make the tool calls that are open, else ask the model, and record what came of it.

    Returns what people have to decide before the run can go on.
    """

    async def record(steps: Sequence[Step], used: RunUsage = NOTHING) -> None:
        await journal.record(steps, used)
        state.add(steps, used)

    if not state.open_calls():
        step = _model_step(state, await asker.ask(state))
        # failpoint: before_reply_recorded
        await record([step], _used_by(step))
        # failpoint: after_reply_recorded
        return ()

    todo = plan(state)
    if todo.intents:
        await record(todo.intents)
        # failpoint: after_intent
    results = list(todo.answered)
    try:
        await caller.make(state, todo.calls, results)
    finally:  # also when this is interrupted: what is known to have happened is not left in doubt
        # failpoint: after_effect
        if results:
            await record(results)
    # failpoint: after_results_recorded
    doubts = [questions.in_doubt(step) for step in results if step.state is ToolState.IN_DOUBT]
    return [*todo.questions, *doubts]


def _model_step(state: RunState, answer: Answer) -> ModelStep:
    reply = answer.reply
    price = state.prices.get(answer.model)
    return ModelStep(
        seq=state.next_seq,
        attempt=state.run.attempt,
        model=answer.model,
        content=reply.content,
        tool_calls=reply.tool_calls,
        finish_reason=reply.finish_reason,
        correction=None if reply.tool_calls else correction(state.agent, reply.content, reply.finish_reason),
        usage=reply.usage,
        cost_usd=price.of(reply.usage) if price else None,
        duration_ms=answer.duration_ms,
        retries=answer.retries,
    )


def _used_by(step: ModelStep) -> RunUsage:
    return RunUsage(
        model_calls=1,
        input_tokens=step.usage.input_tokens,
        cached_tokens=step.usage.cached_tokens,
        output_tokens=step.usage.output_tokens,
        cost_usd=step.cost_usd,
    )
