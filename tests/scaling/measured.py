"""What came of a scenario, and whether it is what was promised."""

from dataclasses import dataclass

from tests.scaling.cluster import START_UP_S, Cluster
from tests.scaling.platform import CACHED_S, POLL_S, Autoscaler, Moment, Platform, Policy
from tests.scaling.traffic import Scenario

REACTION_S = POLL_S + CACHED_S + START_UP_S
"""Nothing that is counted and polled is quicker: until the number is asked for, has come, and workers are there."""
_REST_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Seconds; `drain_s`: the longest time for which a run was queued before it was taken, less the time that it takes
    to react: the target says how long that may be. `is_bounded`: the most workers were too few for what was asked."""

    scenario: Scenario
    platform: Platform
    policy: str
    p50_s: float
    p95_s: float
    max_s: float
    drain_s: float
    below_busy: int
    busy_stopped: int
    handed_back: int
    worker_hours: float
    is_bounded: bool
    unended: int
    history: list[Moment]
    waits: list[tuple[float, float]]

    @property
    def broken(self) -> list[str]:
        """Of what is promised of our own number, what did not hold."""
        found = []
        if self.below_busy:
            found.append(f"fewer workers than were busy were asked for, {self.below_busy} times")
        if self.platform.spares_the_busy and (self.busy_stopped or self.handed_back):
            found.append(f"{self.busy_stopped} busy workers were stopped, {self.handed_back} runs interrupted")
        if self.scenario.is_one_kind and not self.is_bounded and self.drain_s > self.scenario.rules.target_drain_s:
            found.append(f"the queue took {self.drain_s:.0f} s, not {self.scenario.rules.target_drain_s:.0f}")
        if self.unended:
            found.append(f"{self.unended} runs did not end")
        return found

    @property
    def title(self) -> str:
        return f"{self.scenario.name}, {self.platform.name}, {self.policy}"


def measure(scenario: Scenario, platform: Platform, policy: Policy, *, name: str, seed: int) -> Outcome:
    cluster = Cluster(scenario.arrivals, slots=scenario.rules.slots_per_worker, grace_s=platform.grace_s)
    autoscaler = Autoscaler(cluster, policy, platform, scenario, seed)
    cluster.play(scenario.lasts + _REST_S)
    load = cluster.load()
    waits = sorted(wait for _, wait in cluster.waits)
    return Outcome(
        scenario=scenario,
        platform=platform,
        policy=name,
        p50_s=waits[len(waits) // 2],
        p95_s=waits[len(waits) * 95 // 100],
        max_s=waits[-1],
        drain_s=max(0.0, waits[-1] - REACTION_S),
        below_busy=autoscaler.below_busy,
        busy_stopped=cluster.busy_stopped,
        handed_back=cluster.handed_back,
        worker_hours=cluster.workers_seconds / 3600,
        is_bounded=autoscaler.was_bounded,
        unended=load.queued + load.running,
        history=autoscaler.history,
        waits=cluster.waits,
    )
