"""The bounds of a run, asked once before each step: before the model is asked and before tools are called."""

from decimal import Decimal

from app.domain.run import StopReason
from app.domain.step import ToolState, ToolStep
from worker.state import RunState
from worker.transcript import most_input_tokens


def exceeded(state: RunState) -> StopReason | None:
    """The limit that forbids another step, or None."""
    return _misbehaviour(state) or _used_up(state)


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
