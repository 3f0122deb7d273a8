"""What starts and stops workers: polls a number, follows it up at once and down after a while, and picks victims."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from random import Random

from app.domain.scaling import Load, ScalingRules, desired_workers
from tests.scaling.cluster import Cluster, Worker
from tests.scaling.traffic import Scenario

POLL_S = 15.0
CACHED_S = 5.0
"""The number is as old as this when it comes, at worst."""
DOWN_AFTER_S = 300.0
"""Fewer workers only when none of the numbers of so long has asked for more: what Kubernetes does by default."""
RUNS_PER_WORKER = 5
"""What a trigger on the list's length divides by, where nobody says otherwise."""

Policy = Callable[[Load, ScalingRules], int]


def by_queue_length(load: Load, rules: ScalingRules) -> int:
    """What a trigger on the length of the queue's list asks for: runs that are held do not count."""
    return min(max(ceil(load.queued / RUNS_PER_WORKER), rules.min_workers), rules.max_workers)


POLICIES: dict[str, Policy] = {"desired_workers": desired_workers, "queue length / 5": by_queue_length}
OURS = "desired_workers"


@dataclass(frozen=True, slots=True)
class Platform:
    """`spares_the_busy`: a worker that holds a run is not stopped. `grace_s`: what DRAIN_SECONDS can be there."""

    name: str
    grace_s: float
    spares_the_busy: bool


PLATFORMS = (
    Platform("ECS", 110.0, spares_the_busy=True),
    Platform("Kubernetes", 50.0, spares_the_busy=False),
    Platform("Cloud Run", 8.0, spares_the_busy=False),
)


@dataclass(frozen=True, slots=True)
class Moment:
    """What there was when the number was asked for."""

    at: float
    queued: int
    workers: int


class Autoscaler:
    """`below_busy`: how often it asked for fewer workers than were busy at that time. `was_bounded`: it would have
    asked for more than the most."""

    def __init__(self, cluster: Cluster, policy: Policy, platform: Platform, scenario: Scenario, seed: int) -> None:
        self.below_busy = 0
        self.was_bounded = False
        self.history: list[Moment] = []
        self._cluster = cluster
        self._policy = policy
        self._platform = platform
        self._rules = scenario.rules
        self._endless = ScalingRules(
            slots_per_worker=scenario.rules.slots_per_worker,
            target_drain_s=scenario.rules.target_drain_s,
            min_workers=scenario.rules.min_workers,
            max_workers=10**9,
        )
        self._random = Random(seed)
        self._asked: list[tuple[float, int]] = []
        for _ in range(scenario.rules.min_workers):
            cluster.start_worker()
        cluster.at(0.0, self._poll)

    def _poll(self) -> None:
        cluster = self._cluster
        load = cluster.load()
        number = self._policy(load, self._rules)
        self.below_busy += number < min(load.busy_workers, self._rules.max_workers)
        self.was_bounded |= self._policy(load, self._endless) > self._rules.max_workers
        self.history.append(Moment(cluster.now, load.queued, len(cluster.workers)))
        cluster.at(cluster.now + CACHED_S, lambda: self._follow(number))
        cluster.at(cluster.now + POLL_S, self._poll)

    def _follow(self, number: int) -> None:
        now = self._cluster.now
        self._asked = [(at, asked) for at, asked in self._asked if at > now - DOWN_AFTER_S] + [(now, number)]
        wanted = self._cluster.wanted
        highest = max(asked for _, asked in self._asked)
        for _ in range(len(wanted), number):
            self._cluster.start_worker()
        for victim in self._victims(wanted)[: max(0, len(wanted) - highest)]:
            self._cluster.stop_worker(victim)

    def _victims(self, workers: list[Worker]) -> list[Worker]:
        """Those that may be stopped, in the order in which they would be."""
        order = self._random.sample(workers, len(workers))
        return [worker for worker in order if not (worker.runs and self._platform.spares_the_busy)]
