"""How many workers there should be: one number, from what is queued and who is busy.

    desired = max(busy, min(busy + drain, all)), within [min, max]

    busy   workers that hold a run: fewer would stop one in the middle of it
    drain  workers that take what is queued within the target, beside those that are busy
    all    workers whose slots are enough for every run there is: more would find nothing to do

The number goes up at once. Coming down slowly is up to whatever starts and stops workers (a stabilisation window, a
cool-down): it knows what it asked for before, and this does not.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isfinite

USUAL_RUN_S = 10.0
"""What a run is thought to take at least while none has ended lately: a few model calls take about as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What there is to do, and who does it.

    `queued`: runs that no worker holds and that could be taken now. `running`: runs that a worker holds.
    `busy_workers`: how many workers these are; runs spread over workers, so they are usually more than would fit.
    `median_run_s`: for how long runs are in the hands of workers; see `typical_run_s`.
    """

    queued: int
    running: int
    busy_workers: int
    median_run_s: float

    def __post_init__(self) -> None:
        if min(self.queued, self.running, self.busy_workers) < 0:
            raise ValueError("counts of runs and workers cannot be negative")
        if self.busy_workers > self.running:
            raise ValueError("a worker is busy only with a run of its own")
        if not isfinite(self.median_run_s) or self.median_run_s < 0:
            raise ValueError("a run takes a number of seconds, none at least")


def typical_run_s(*, ended_lately_s: float | None, running_s: float | None) -> float:
    """What a run takes: the median of those that ended lately, or what is known before the first has ended.

    `running_s`: for how long those that run have been at it, the median. Where runs take minutes, it is this that says
    so while none has ended. It would say too much later, because of all runs the long ones are met running most often.
    """
    if ended_lately_s is not None:
        return ended_lately_s
    return max(USUAL_RUN_S, running_s or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRules:
    """What the operator wants. `slots_per_worker`: runs that one worker executes at a time."""

    slots_per_worker: int
    target_drain_s: float
    min_workers: int
    max_workers: int

    def __post_init__(self) -> None:
        if self.slots_per_worker < 1:
            raise ValueError("a worker has a slot at least")
        if not isfinite(self.target_drain_s) or self.target_drain_s <= 0:
            raise ValueError("the queue is drained within a number of seconds above 0")
        if not 0 <= self.min_workers <= self.max_workers:
            raise ValueError("the fewest workers are 0 at least, and not more than the most")


def desired_workers(load: Load, rules: ScalingRules) -> int:
    """How many workers there should be now.

    Never fewer than are busy, but where these are more than `max_workers`: that is what the operator means to pay at
    most, so it holds also when it was lowered a moment ago, or while workers of two releases are busy. A worker that is
    stopped hands its runs back, and nothing is lost.
    """
    of_all = ceil(Fraction(load.queued + load.running, rules.slots_per_worker))
    wanted = max(load.busy_workers, min(load.busy_workers + _to_drain(load, rules), of_all))
    return min(max(wanted, rules.min_workers), rules.max_workers)


def _to_drain(load: Load, rules: ScalingRules) -> int:
    """Workers that take everything queued within the target; one at least, however short runs are."""
    if load.queued == 0:
        return 0
    # Fractions: no product of these is too large, and nothing is rounded before the end.
    work = load.queued * Fraction(load.median_run_s)
    return max(1, ceil(work / (rules.slots_per_worker * Fraction(rules.target_drain_s))))
