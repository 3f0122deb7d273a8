"""How many workers there should be, whatever the load: what always holds, and some cases worked out by hand."""

from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from app.domain.scaling import USUAL_RUN_S, Load, ScalingRules, desired_workers, typical_run_s

HUGE = 10**30
MANY = st.one_of(st.integers(0, 50), st.integers(0, 100_000), st.integers(0, HUGE))
SECONDS = st.floats(0, allow_nan=False, allow_infinity=False)
ENDLESS = HUGE * 10
"""A maximum that is never reached."""

property_test = settings(database=None, deadline=None)


@st.composite
def loads(draw: st.DrawFn) -> Load:
    running = draw(MANY)
    return Load(
        queued=draw(MANY), running=running, busy_workers=draw(st.integers(0, running)), median_run_s=draw(SECONDS)
    )


@st.composite
def rules(draw: st.DrawFn) -> ScalingRules:
    fewest = draw(st.integers(0, 100))
    return ScalingRules(
        slots_per_worker=draw(st.one_of(st.just(1), st.integers(1, 10_000))),
        target_drain_s=draw(st.floats(0, exclude_min=True, allow_infinity=False)),
        min_workers=fewest,
        max_workers=draw(st.integers(max(1, fewest), 10_000)),
    )


def unbounded(rules: ScalingRules) -> ScalingRules:
    return replace(rules, min_workers=0, max_workers=ENDLESS)


@property_test
@given(loads(), rules())
def test_there_are_never_fewer_than_the_fewest_nor_more_than_the_most(load: Load, rules: ScalingRules) -> None:
    assert rules.min_workers <= desired_workers(load, rules) <= rules.max_workers


@property_test
@given(loads(), rules())
def test_there_are_never_fewer_than_are_busy_unless_these_are_more_than_the_most(
    load: Load, rules: ScalingRules
) -> None:
    assert desired_workers(load, rules) >= min(load.busy_workers, rules.max_workers)


@property_test
@given(loads(), rules(), MANY)
def test_more_that_is_queued_or_runs_never_needs_fewer(load: Load, rules: ScalingRules, more: int) -> None:
    now = desired_workers(load, rules)
    assert desired_workers(replace(load, queued=load.queued + more), rules) >= now
    assert desired_workers(replace(load, running=load.running + more), rules) >= now
    assert (
        desired_workers(replace(load, running=load.running + more, busy_workers=load.busy_workers + more), rules) >= now
    )


@property_test
@given(loads(), rules(), SECONDS)
def test_longer_runs_never_need_fewer(load: Load, rules: ScalingRules, more: float) -> None:
    assume(load.median_run_s + more < float("inf"))
    slower = replace(load, median_run_s=load.median_run_s + more)
    assert desired_workers(slower, rules) >= desired_workers(load, rules)


@property_test
@given(loads(), rules())
def test_with_nothing_queued_there_are_as_many_as_are_busy(load: Load, rules: ScalingRules) -> None:
    rested = replace(load, queued=0)
    assert desired_workers(rested, unbounded(rules)) == load.busy_workers


@property_test
@given(loads(), rules())
def test_what_is_queued_always_finds_a_slot(load: Load, rules: ScalingRules) -> None:
    """The slots of those that are wanted hold everything, or those that are free hold a part of it."""
    assume(load.queued > 0 and load.running <= load.busy_workers * rules.slots_per_worker)
    wanted = desired_workers(load, unbounded(rules))
    assert wanted * rules.slots_per_worker > load.running


@property_test
@given(loads(), rules())
def test_no_worker_is_asked_for_that_would_find_nothing_to_do(load: Load, rules: ScalingRules) -> None:
    wanted = desired_workers(load, unbounded(rules))
    assert wanted == load.busy_workers or (wanted - 1) * rules.slots_per_worker < load.queued + load.running


@property_test
@given(loads(), rules())
def test_those_that_are_not_busy_take_all_that_is_queued_within_the_target(load: Load, rules: ScalingRules) -> None:
    """Each slot of theirs takes `target / median` runs; or there are slots for everything at once."""
    wanted = desired_workers(load, unbounded(rules))
    fresh = wanted - load.busy_workers
    assume(rules.target_drain_s > 1e-200 < load.median_run_s < 1e200 and rules.target_drain_s < 1e200)
    taken = fresh * rules.slots_per_worker * (rules.target_drain_s / load.median_run_s)
    has_slots_for_all = wanted * rules.slots_per_worker >= load.queued + load.running
    assert has_slots_for_all or taken >= load.queued * (1 - 1e-9)


@property_test
@given(loads(), rules())
def test_once_they_are_busy_and_nothing_is_queued_it_stays_so(load: Load, rules: ScalingRules) -> None:
    wanted = desired_workers(load, rules)
    taken = replace(load, queued=0, running=max(load.queued + load.running, wanted), busy_workers=wanted)
    assert desired_workers(taken, rules) == wanted


@pytest.mark.parametrize(
    ("queued", "running", "busy", "median_s", "slots", "wanted"),
    [
        (0, 0, 0, 10.0, 100, 0),
        (1, 0, 0, 10.0, 100, 1),
        (1, 0, 0, 0.0, 100, 1),  # runs that take no time have to be taken all the same
        (40, 25, 2, 4.2, 100, 2),  # those two have room for all
        (180, 110, 2, 4.2, 100, 3),
        (0, 3, 3, 4.2, 100, 3),  # each holds one: none of them may go
        (1000, 0, 0, 3.0, 1, 100),  # a slot takes ten of them in 30 s
        (1001, 0, 0, 3.0, 1, 101),
        (1000, 50, 50, 3.0, 1, 150),  # those that are busy stay so
        (4, 0, 0, 600.0, 1, 4),  # long runs: one for each, and not eighty
        (90, 10, 10, 600.0, 10, 10),
        (91, 10, 10, 600.0, 10, 11),
    ],
)
def test_some_that_were_worked_out_by_hand(
    *, queued: int, running: int, busy: int, median_s: float, slots: int, wanted: int
) -> None:
    load = Load(queued=queued, running=running, busy_workers=busy, median_run_s=median_s)
    rules = ScalingRules(slots_per_worker=slots, target_drain_s=30, min_workers=0, max_workers=1000)
    assert desired_workers(load, rules) == wanted


def test_the_most_holds_also_where_more_are_busy() -> None:
    """What it costs is the operator's to say; those that are stopped hand their runs back."""
    load = Load(queued=5, running=12, busy_workers=12, median_run_s=1)
    rules = ScalingRules(slots_per_worker=1, target_drain_s=30, min_workers=1, max_workers=10)
    assert desired_workers(load, rules) == 10


@pytest.mark.parametrize(
    ("ended_lately_s", "running_s", "takes"),
    [
        (None, None, USUAL_RUN_S),
        (None, 3.0, USUAL_RUN_S),  # they have hardly begun
        (None, 240.0, 240.0),
        (2.0, 240.0, 2.0),  # of all runs, the long ones are met running
        (0.0, 240.0, 0.0),
    ],
)
def test_what_runs_take_is_what_those_took_that_ended(
    ended_lately_s: float | None, running_s: float | None, takes: float
) -> None:
    assert typical_run_s(ended_lately_s=ended_lately_s, running_s=running_s) == takes


LOAD = Load(queued=1, running=1, busy_workers=1, median_run_s=1)
RULES = ScalingRules(slots_per_worker=1, target_drain_s=30, min_workers=1, max_workers=10)


@pytest.mark.parametrize(
    ("of", "wrong"),
    [
        (LOAD, {"queued": -1}),
        (LOAD, {"running": -1, "busy_workers": -1}),
        (LOAD, {"busy_workers": -1}),
        (LOAD, {"busy_workers": 2}),
        (LOAD, {"median_run_s": -0.1}),
        (LOAD, {"median_run_s": float("nan")}),
        (LOAD, {"median_run_s": float("inf")}),
        (RULES, {"slots_per_worker": 0}),
        (RULES, {"target_drain_s": 0.0}),
        (RULES, {"target_drain_s": -1.0}),
        (RULES, {"target_drain_s": float("nan")}),
        (RULES, {"target_drain_s": float("inf")}),
        (RULES, {"min_workers": -1}),
        (RULES, {"min_workers": 11}),
    ],
)
def test_what_cannot_be_is_refused(of: Load | ScalingRules, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        type(of)(**asdict(of) | wrong)
