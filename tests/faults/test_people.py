"""A process dies, or freezes, at each point around asking a person, their decision, and going on after it."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.conftest import Hold
from tests.faults.failpoints import FREEZE, KILL
from tests.faults.rig import LEASE_SECONDS, Rig
from tests.faults.victim import Victim

RUNS = 8
ASKING = ["after_reply_recorded", "before_settle", "after_settle"]
GOING_ON = [
    "after_decision",
    "before_put_back",
    "after_put_back",
    "before_claim",
    "after_claim",
    "after_load",
    "after_intent",
    "after_effect",
    "after_results_recorded",
]


def all_wait(rig: Rig, runs: list[str]) -> bool:
    return rig.open_of(runs) == dict.fromkeys(runs, "waiting")


def fault(action: str) -> str:
    return "kill -9, and people" if action == KILL else f"SIGSTOP beyond the lease of {LEASE_SECONDS} s, and people"


@pytest.mark.parametrize("action", [KILL, FREEZE])
@pytest.mark.parametrize("name", ASKING)
def test_a_person_is_asked_once_whatever_happens_to_the_worker_at(
    rig: Rig, holds: Hold, name: str, action: str
) -> None:
    victim = Victim(rig, rig.failpoint(name), action)
    with victim.watched():
        runs = rig.submit(RUNS, agent="teller")
        rig.until(lambda: all_wait(rig, runs), seconds=20)
    victim.awake()
    assert all_wait(rig, runs)
    asked = rig.rows("SELECT count(*) AS n FROM reviews WHERE run_id = ANY(%s::uuid[])", [runs])
    assert asked == [{"n": RUNS}]
    rig.settle(runs)
    rig.heal()
    holds(fault(action), f"asking: {name}", runs)


@pytest.mark.parametrize("action", [KILL, FREEZE])
@pytest.mark.parametrize("name", GOING_ON)
def test_what_a_person_allowed_happens_once_whatever_dies_at(rig: Rig, holds: Hold, name: str, action: str) -> None:
    runs = rig.submit(RUNS, agent="teller")
    rig.until(lambda: all_wait(rig, runs))
    victim = Victim(rig, rig.failpoint(name), action)
    with victim.watched(), ThreadPoolExecutor(RUNS) as reviewers:
        list(reviewers.map(rig.decide, runs))
        rig.rest(runs)
    victim.awake()
    rig.settle(runs)
    rig.heal()
    holds(fault(action), f"going on: {name}", runs)
