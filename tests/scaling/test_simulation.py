"""The simulation is one of what it says, finds what is wrong with a number of workers, and finds nothing with ours."""

from dataclasses import replace
from math import ceil

import pytest

from app.devstack.stack import ROOT
from app.domain.scaling import Load, ScalingRules, desired_workers
from tests.scaling.__main__ import SEED, drawn, simulate
from tests.scaling.cluster import START_UP_S, Cluster
from tests.scaling.measured import Outcome, measure
from tests.scaling.platform import OURS, PLATFORMS, Policy, by_queue_length
from tests.scaling.report import table
from tests.scaling.traffic import Arrival, Scenario, scenarios

ECS, KUBERNETES, CLOUD_RUN = PLATFORMS
SCENARIOS = {scenario.name: scenario for scenario in scenarios(SEED)}


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return simulate(SEED)


def test_our_number_keeps_its_promises(outcomes: list[Outcome]) -> None:
    ours = [outcome for outcome in outcomes if outcome.policy == OURS]
    assert len(ours) == len(SCENARIOS) * len(PLATFORMS)
    assert [(outcome.title, outcome.broken) for outcome in ours if outcome.broken] == []
    assert sum(outcome.scenario.is_one_kind and not outcome.is_bounded for outcome in ours) >= 18


def test_what_is_drawn_is_what_the_simulation_says(outcomes: list[Outcome]) -> None:
    assert (ROOT / "docs" / "scaling.svg").read_text() == drawn(outcomes), "make simulate-scaling draws it anew"


def test_the_table_has_a_line_for_each(outcomes: list[Outcome]) -> None:
    lines = table(outcomes).splitlines()
    assert len(lines) == 1 + len(outcomes)
    assert len({len(line) for line in lines}) == 1


def by_slots(load: Load, rules: ScalingRules) -> int:
    """As if runs filled one worker after the other."""
    return desired_workers(replace(load, busy_workers=ceil(load.running / rules.slots_per_worker)), rules)


def without_the_busy(load: Load, rules: ScalingRules) -> int:
    return desired_workers(replace(load, busy_workers=0), rules)


def sluggish(load: Load, rules: ScalingRules) -> int:
    """Drains in ten times the target."""
    return desired_workers(load, replace(rules, target_drain_s=rules.target_drain_s * 10))


@pytest.mark.parametrize(
    ("policy", "scenario", "wrong"),
    [
        (by_slots, "100-slot workers", "fewer workers than were busy"),
        (without_the_busy, "one-slot workers", "fewer workers than were busy"),
        (by_queue_length, "sawtooth", "fewer workers than were busy"),
        (by_queue_length, "long runs", "the queue took"),
        (sluggish, "short runs", "the queue took"),
        (lambda load, rules: min(desired_workers(load, rules), load.busy_workers + 1), "one-slot workers", "the queue"),
        (lambda load, rules: rules.min_workers, "long runs", "did not end"),
    ],
)
def test_a_number_that_is_not_good_enough_is_found(policy: Policy, scenario: str, wrong: str) -> None:
    outcome = measure(SCENARIOS[scenario], ECS, policy, name="other", seed=1)
    assert [what for what in outcome.broken if wrong in what], outcome.broken


@pytest.mark.parametrize("seed", (100, 200))
def test_other_traffic_of_these_kinds_is_no_different(seed: int) -> None:
    for scenario in scenarios(seed):
        outcome = measure(scenario, ECS, desired_workers, name=OURS, seed=seed)
        assert outcome.broken == [], outcome.title


def cluster_of(*arrivals: Arrival, slots: int, grace_s: float = 10) -> Cluster:
    cluster = Cluster(arrivals, slots=slots, grace_s=grace_s)
    cluster.start_worker()
    return cluster


def test_runs_wait_until_a_worker_is_there_and_then_for_a_slot() -> None:
    cluster = cluster_of(Arrival(1, 5), Arrival(2, 5), Arrival(3, 5), slots=2)
    cluster.play(100)
    assert cluster.waits == [
        (START_UP_S, START_UP_S - 1),
        (START_UP_S, START_UP_S - 2),
        (START_UP_S + 5, START_UP_S + 2),
    ]
    assert cluster.workers_seconds == 100
    assert cluster.load().running == 0


def stopped_at_20(*, takes: float) -> Cluster:
    """A worker with a run that it took at 13, and a second one that is ready at 14."""
    cluster = cluster_of(Arrival(13, takes), slots=1)
    cluster.at(2, cluster.start_worker)
    cluster.at(20, lambda: cluster.stop_worker(next(worker for worker in cluster.workers if worker.runs)))
    cluster.play(100)
    return cluster


def test_a_worker_that_is_stopped_ends_what_it_can_within_the_grace() -> None:
    cluster = stopped_at_20(takes=16)
    assert (cluster.busy_stopped, cluster.handed_back) == (1, 0)
    assert cluster.workers_seconds == 29 + 98
    assert cluster.load() == Load(queued=0, running=0, busy_workers=0, median_run_s=16)


def test_what_it_cannot_end_another_one_does_from_where_it_was() -> None:
    cluster = stopped_at_20(takes=40)
    assert (cluster.busy_stopped, cluster.handed_back) == (1, 1)
    assert cluster.workers_seconds == 30 + 98
    assert cluster.load() == Load(queued=0, running=0, busy_workers=0, median_run_s=40)
    assert len(cluster.waits) == 1


def test_runs_spread_over_the_workers_that_have_slots() -> None:
    cluster = cluster_of(*(Arrival(20 + second, 50) for second in range(4)), slots=10)
    busy = []
    for _ in range(3):
        cluster.start_worker()
    cluster.at(30, lambda: busy.append(cluster.load().busy_workers))
    cluster.play(100)
    assert busy == [4]


def test_a_platform_follows_up_at_once_and_down_slowly() -> None:
    rules = ScalingRules(slots_per_worker=1, target_drain_s=30, min_workers=1, max_workers=10)
    scenario = Scenario("one run", (Arrival(20, 1), Arrival(100, 100)), rules, lasts=100)

    def six_while_anybody_is_busy(load: Load, _: ScalingRules) -> int:
        return 6 if load.busy_workers else 1

    outcome = measure(scenario, ECS, six_while_anybody_is_busy, name="", seed=1)
    workers = {moment.at: moment.workers for moment in outcome.history}
    # Looked at every 15 s; the number takes 5 s. The last time that anybody was busy was at 195 s.
    assert {at: workers[at] for at in (0, 105, 120, 495, 510)} == {0: 1, 105: 1, 120: 6, 495: 6, 510: 1}
