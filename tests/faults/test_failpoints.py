"""kill -9 at every failpoint; and a freeze at every failpoint that outlasts the lease, and then a late awakening."""

import signal
from collections.abc import Callable

import httpx
import pytest

from tests.faults import failpoints
from tests.faults.conftest import Hold
from tests.faults.failpoints import FREEZE, KILL
from tests.faults.rig import LEASE_SECONDS, Rig
from tests.faults.victim import Victim
from tests.scripts import DONE, Script, call

TAKEOVER_SECONDS = 12.0
"""From a worker's last write: the lease (3 s), a sweep (2 s), and in the worst case the lock of a frozen sweeper, which
Postgres takes away (5 s).
"""
RUNS = 8


def under_load(rig: Rig) -> list[str]:
    return rig.submit(RUNS, agent="cashier")


def for_longer_than_a_heartbeat(rig: Rig) -> list[str]:
    return rig.submit(RUNS, agent="cashier", text="bench:4:0.5")


def while_draining(rig: Rig) -> list[str]:
    runs = rig.submit(RUNS, agent="cashier", text="bench:4:0.8")
    rig.until(lambda: "running" in rig.open_of(runs).values())
    holder = next(worker for worker in rig.workers if rig.held_by(worker))
    holder.signal(signal.SIGTERM)
    return runs


def while_sweeping(rig: Rig) -> list[str]:
    """A worker dies, so that there is something to sweep."""
    runs = rig.submit(RUNS, agent="cashier", text="bench:4:0.8")
    rig.until(lambda: "running" in rig.open_of(runs).values())
    holder = next(worker for worker in rig.workers if rig.held_by(worker))
    holder.kill()
    holder.start()
    return runs


def when_a_person_decides(rig: Rig) -> list[str]:
    script = Script(rig.model_url, [call("open_the_door"), DONE])
    runs = rig.submit(1, agent="toolbox", text=script.input)
    rig.until(lambda: rig.open_of(runs) == {runs[0]: "waiting"})
    rig.decide(runs[0])
    return runs


def when_somebody_cancels(rig: Rig) -> list[str]:
    runs = rig.submit(RUNS, agent="cashier", text="bench:4:0.8")
    rig.until(lambda: "running" in rig.open_of(runs).values())
    try:
        rig.client.post(f"/v1/runs/{runs[0]}/cancel", timeout=2)
    except httpx.TransportError:  # the API was stopped after the commit
        assert rig.rows("SELECT status FROM runs WHERE id = %s", [runs[0]])[0]["status"] == "cancelled"
    return runs


SITUATIONS: dict[str, Callable[[Rig], list[str]]] = {
    "before_heartbeat": for_longer_than_a_heartbeat,
    "after_heartbeat": for_longer_than_a_heartbeat,
    "drain_begun": while_draining,
    "drain_cut_off": while_draining,
    "after_rescue": while_sweeping,
    "before_unmark": while_sweeping,
    "after_decision": when_a_person_decides,
    "before_put_back": when_a_person_decides,
    "after_put_back": when_a_person_decides,
    "after_cancel": when_somebody_cancels,
}
"""Where it takes more than load to get there."""


@pytest.mark.parametrize("action", [KILL, FREEZE])
@pytest.mark.parametrize("name", [name for name in failpoints.names() if not name.startswith("seal_")])
def test_no_run_is_lost_and_no_effect_doubled_at(rig: Rig, holds: Hold, name: str, action: str) -> None:
    victim = Victim(rig, rig.failpoint(name), action)
    with victim.watched():
        runs = SITUATIONS.get(name, under_load)(rig)
        rig.rest(runs)
    assert max(rig.takeovers(runs), default=0) < TAKEOVER_SECONDS
    victim.awake()
    rig.settle(runs)
    if SITUATIONS.get(name) is while_draining:
        victim.gone()
    rig.heal()
    fault = "kill -9" if action == KILL else f"SIGSTOP beyond the lease of {LEASE_SECONDS} s, SIGCONT"
    holds(fault, name, runs)


@pytest.mark.parametrize("name", ["before_reply_recorded", "after_effect", "before_settle"])
def test_a_worker_that_wakes_while_another_holds_its_run_writes_nothing(rig: Rig, holds: Hold, name: str) -> None:
    victim = Victim(rig, rig.failpoint(name), FREEZE)
    with victim.watched():
        runs = rig.submit(RUNS, text="bench:4:0.8")
        rig.until(lambda: rig.takeovers(runs), seconds=TAKEOVER_SECONDS)
        victim.awake()
    rig.settle(runs)
    holds("SIGSTOP, SIGCONT while another holds the run", name, runs)
