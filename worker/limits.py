"""The bounds of a run, asked once before each step: before the model is asked and before tools are called.

A run that reaches one ends, or, where its agent wants that, a person is asked to raise it.
"""

import math
from decimal import ROUND_UP, Decimal

from app.domain.agent import Limits, OnLimit
from app.domain.review import ReviewRequest
from app.domain.run import StopReason
from app.domain.step import ToolState, ToolStep
from worker import questions
from worker.state import RunState
from worker.transcript import most_input_tokens

_LIMIT_OF = {
    StopReason.MAX_STEPS: "max_steps",
    StopReason.MAX_TOKENS: "max_tokens",
    StopReason.MAX_COST: "max_cost_usd",
    StopReason.DEADLINE: "deadline_s",
    StopReason.LOOP_DETECTED: "max_repeats",
    StopReason.MODEL_ERROR: "max_mistakes",
    StopReason.TOOL_ERROR: "max_mistakes",
    StopReason.INVALID_OUTPUT: "max_mistakes",
}
"""The field of `Limits` that a run has reached which stops for this reason."""
_USELESS = {
    StopReason.MODEL_ERROR: "the tool calls were malformed",
    StopReason.TOOL_ERROR: "the tools failed unexpectedly",
    StopReason.INVALID_OUTPUT: "the answer could not be used",
}


def exceeded(state: RunState) -> StopReason | None:
    """The limit that forbids another step, or None."""
    return _misbehaviour(state) or _used_up(state)


def escalation(state: RunState, reason: StopReason) -> ReviewRequest | None:
    """What a person is asked instead of ending the run: twice the limit, or more where the next step needs it.

    None: the agent does not ask people, or the limit is as high as any may be.
    """
    if state.agent.on_limit is not OnLimit.ESCALATE:
        return None
    name = _LIMIT_OF[reason]
    present, highest = getattr(state.run.limits, name), _highest(name)
    if present >= highest:
        return None
    enough, stand = _stand(state, reason)
    proposed = min(max(2 * present, enough), highest)
    value = float(proposed) if isinstance(proposed, Decimal) else proposed
    return questions.limit(reason, {name: value}, f"The run has reached {name}: {stand}.")


def most_output_tokens(state: RunState) -> int:
    """How long the next reply may be."""
    return min(state.agent.max_output_tokens, state.run.limits.max_tokens - state.usage.total_tokens)


def most_cost(state: RunState) -> Decimal:
    """What the next call may cost at most (US dollars), whichever of the run's models answers."""
    input_tokens, output_tokens = most_input_tokens(state), most_output_tokens(state)
    return max(
        (
            price.at_most(input_tokens=input_tokens, output_tokens=output_tokens)
            for price in state.prices.values()
            if price is not None
        ),
        default=Decimal(0),
    )


def _used_up(state: RunState) -> StopReason | None:
    limits, usage = state.run.limits, state.usage
    if state.time_left() <= 0:
        return StopReason.DEADLINE
    if usage.model_calls >= limits.max_steps:
        return StopReason.MAX_STEPS
    if usage.total_tokens >= limits.max_tokens:
        return StopReason.MAX_TOKENS
    if limits.max_cost_usd is not None and (usage.cost_usd or 0) + most_cost(state) > limits.max_cost_usd:
        return StopReason.MAX_COST
    return None


def _misbehaviour(state: RunState) -> StopReason | None:
    limits = state.run.limits
    if state.most_repeats() > limits.max_repeats:
        return StopReason.LOOP_DETECTED
    count, step = state.failures_in_a_row()
    if count <= limits.max_mistakes:
        return None
    if isinstance(step, ToolStep):
        return StopReason.TOOL_ERROR if step.state is ToolState.CRASHED else StopReason.MODEL_ERROR
    return StopReason.INVALID_OUTPUT


def _stand(state: RunState, reason: StopReason) -> tuple[int | Decimal, str]:
    """The least with which the run could take another step, and where it stands, in numbers for a person."""
    limits, usage = state.run.limits, state.usage
    match reason:
        case StopReason.MAX_STEPS:
            return usage.model_calls + 1, f"{usage.model_calls} of {limits.max_steps} model calls"
        case StopReason.MAX_TOKENS:
            next_call = most_input_tokens(state) + state.agent.max_output_tokens
            return usage.total_tokens + next_call, f"{usage.total_tokens:,} of {limits.max_tokens:,} tokens"
        case StopReason.MAX_COST:
            spent, next_cost = usage.cost_usd or Decimal(0), most_cost(state)
            enough = (spent + next_cost).quantize(Decimal("0.0001"), ROUND_UP)
            used = f"{spent:.4f} of {limits.max_cost_usd:f} US dollars"
            return enough, f"{used}, and the next model call may cost up to {next_cost:.4f}"
        case StopReason.DEADLINE:
            ran = limits.deadline_s - state.time_left()
            return math.ceil(ran + 1), f"{ran:.1f} of {limits.deadline_s:g} seconds of running time"
        case StopReason.LOOP_DETECTED:
            times = state.most_repeats()
            return times, f"the model asked {times} times for the same call, allowed: {limits.max_repeats}"
        case _:
            count, _ = state.failures_in_a_row()
            useless = f"replies of no use in a row: {count}, allowed: {limits.max_mistakes}"
            return count, f"{useless}; of the last one, {_USELESS[reason]}"


def _highest(name: str) -> int:
    """The upper bound of a field of `Limits`."""
    bounds = [bound.le for bound in Limits.model_fields[name].metadata if hasattr(bound, "le")]
    assert isinstance(bounds[0], int)
    return bounds[0]
