"""The limit that stops a run, and what a person is asked before it does."""

import time
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from app.domain.agent import Limits
from app.domain.review import ReviewKind, ReviewRequest
from app.domain.run import RunTime, RunUsage, StopReason
from app.domain.step import ModelStep, Step, ToolState
from app.prices import Price
from tests.agents import toolbox
from tests.agents.people import escalating
from tests.unit.test_plan import RUN, asked, recorded, state_of
from worker.limits import escalation, exceeded
from worker.state import RunState

DEAR = Price(input=Decimal(1001), cached_input=Decimal(1001), output=Decimal(1001))


def run_state(*steps: Step, usage: RunUsage | None = None, active_ms: int = 0, **limits: Any) -> RunState:
    state = state_of(*steps, agent=escalating)
    state.run = replace(RUN, limits=Limits(**limits), time=RunTime(active_ms=active_ms))
    state.usage = usage or RunUsage()
    return state


def corrected(times: int) -> list[Step]:
    return [ModelStep(seq=seq, attempt=1, model="m", content="?", correction="again") for seq in range(times)]


def crashed(state: ToolState) -> list[Step]:
    return [asked(("crash", {})), recorded("crash", {}, escalating.tools[0].effect, state)]


SPENT = RunUsage(model_calls=3, input_tokens=1_500, output_tokens=600, cost_usd=Decimal("0.021"))
ECHO = ("echo", {"text": "a"})

CASES: list[tuple[RunState, StopReason, dict[str, Any], str]] = [
    (
        run_state(usage=SPENT, max_steps=3),
        StopReason.MAX_STEPS,
        {"max_steps": 6},
        "The run has reached max_steps: 3 of 3 model calls.",
    ),
    (
        run_state(usage=RunUsage(model_calls=1), max_steps=1),
        StopReason.MAX_STEPS,
        {"max_steps": 2},
        "The run has reached max_steps: 1 of 1 model calls.",
    ),
    (
        run_state(usage=RunUsage(model_calls=600), max_steps=600),
        StopReason.MAX_STEPS,
        {"max_steps": 1_000},
        "The run has reached max_steps: 600 of 600 model calls.",
    ),
    (
        run_state(usage=RunUsage(input_tokens=99_000, output_tokens=1_500)),
        StopReason.MAX_TOKENS,
        {"max_tokens": 200_000},
        "The run has reached max_tokens: 100,500 of 100,000 tokens.",
    ),
    (
        run_state(active_ms=300_100),
        StopReason.DEADLINE,
        {"deadline_s": 600.0},
        "The run has reached deadline_s: 300.1 of 300 seconds of running time.",
    ),
    (
        run_state(active_ms=2_100, deadline_s=0.4),
        StopReason.DEADLINE,
        {"deadline_s": 4},
        "The run has reached deadline_s: 2.1 of 0.4 seconds of running time.",
    ),
    (
        run_state(asked(*[ECHO] * 4)),
        StopReason.LOOP_DETECTED,
        {"max_repeats": 6},
        "The run has reached max_repeats: the model asked 4 times for the same call, allowed: 3.",
    ),
    (
        run_state(asked(*[ECHO] * 9)),
        StopReason.LOOP_DETECTED,
        {"max_repeats": 9},
        "The run has reached max_repeats: the model asked 9 times for the same call, allowed: 3.",
    ),
    (
        run_state(*corrected(4)),
        StopReason.INVALID_OUTPUT,
        {"max_mistakes": 6},
        "The run has reached max_mistakes: replies of no use in a row: 4, allowed: 3; of the last one, "
        "the answer could not be used.",
    ),
    (
        run_state(*corrected(1), max_mistakes=0),
        StopReason.INVALID_OUTPUT,
        {"max_mistakes": 1},
        "The run has reached max_mistakes: replies of no use in a row: 1, allowed: 0; of the last one, "
        "the answer could not be used.",
    ),
    (
        run_state(*crashed(ToolState.CRASHED), max_mistakes=0),
        StopReason.TOOL_ERROR,
        {"max_mistakes": 1},
        "The run has reached max_mistakes: replies of no use in a row: 1, allowed: 0; of the last one, "
        "the tools failed unexpectedly.",
    ),
    (
        run_state(*crashed(ToolState.INVALID), max_mistakes=0),
        StopReason.MODEL_ERROR,
        {"max_mistakes": 1},
        "The run has reached max_mistakes: replies of no use in a row: 1, allowed: 0; of the last one, "
        "the tool calls were malformed.",
    ),
]


def asked_about(state: RunState) -> ReviewRequest:
    reason = exceeded(state)
    assert reason is not None
    request = escalation(state, reason)
    assert request is not None
    return request


@pytest.mark.parametrize(("state", "reason", "proposed", "why"), CASES)
def test_a_person_is_asked_to_raise_the_limit_that_is_reached(
    state: RunState, reason: StopReason, proposed: dict[str, Any], why: str
) -> None:
    state.started_at = time.monotonic()
    request = asked_about(state)
    assert request.arguments == proposed
    assert (request.kind, request.stop_reason, request.why) == (ReviewKind.LIMIT, reason, why)
    assert (request.seq, request.tool) == (None, None)
    assert len(request.args_hash) == 64


@pytest.mark.parametrize("state", [case[0] for case in CASES])
def test_what_is_proposed_is_enough_to_go_on(state: RunState) -> None:
    state.started_at = time.monotonic()
    request = asked_about(state)
    assert isinstance(request.arguments, dict)
    state.run = replace(state.run, limits=Limits.model_validate({**state.run.limits.model_dump(), **request.arguments}))
    assert exceeded(state) is None


def test_the_cost_that_is_proposed_is_enough_for_the_next_call() -> None:
    state = run_state(usage=SPENT, max_cost_usd="0.025")
    state.prices = {"m": DEAR}
    request = asked_about(state)
    assert isinstance(request.arguments, dict)
    proposed = request.arguments["max_cost_usd"]
    assert isinstance(proposed, float)
    assert proposed > 4.1  # a reply of 4,096 tokens, and what is sent for it
    assert request.why.startswith(
        "The run has reached max_cost_usd: 0.0210 of 0.025 US dollars, and the next model call may cost up to "
    )
    state.run = replace(state.run, limits=Limits(max_cost_usd=Decimal(str(proposed))))
    assert exceeded(state) is None


def test_the_cost_that_is_proposed_is_at_least_twice_the_limit() -> None:
    state = run_state(usage=replace(SPENT, cost_usd=Decimal(20)), max_cost_usd=20)
    state.prices = {"m": DEAR}
    assert asked_about(state).arguments == {"max_cost_usd": 40.0}


def test_the_tokens_that_are_proposed_are_enough_for_a_whole_reply() -> None:
    state = run_state(usage=RunUsage(input_tokens=5_000, output_tokens=100), max_tokens=100)
    request = asked_about(state)
    assert isinstance(request.arguments, dict)
    proposed = request.arguments["max_tokens"]
    assert isinstance(proposed, int)
    assert proposed > 5_100 + escalating.max_output_tokens


def test_a_limit_that_is_as_high_as_any_may_be_ends_the_run() -> None:
    for limits, usage in (
        ({"max_steps": 1_000}, RunUsage(model_calls=1_000)),
        ({"max_cost_usd": 10_000}, RunUsage(cost_usd=Decimal(10_001))),
        ({"max_tokens": 100_000_000}, RunUsage(input_tokens=100_000_000)),
    ):
        state = run_state(usage=usage, **limits)
        reason = exceeded(state)
        assert reason is not None
        assert escalation(state, reason) is None


def test_an_agent_that_does_not_ask_people_ends() -> None:
    state = run_state(usage=SPENT, max_steps=3)
    state.agent = toolbox
    assert exceeded(state) is StopReason.MAX_STEPS
    assert escalation(state, StopReason.MAX_STEPS) is None
