"""kill -9 at every failpoint; and a freeze at every failpoint that outlasts the lease, and then a late awakening."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from app.devstack.processes import Process
from tests.faults import failpoints
from tests.faults.conftest import Hold
from tests.faults.failpoints import FREEZE, KILL, Failpoint
from tests.faults.rig import DRAIN_SECONDS, LEASE_SECONDS, Rig
from tests.scripts import DONE, Script, call

TAKEOVER_SECONDS = 12.0
"""From a worker's last write: the lease (3 s), a sweep (2 s), and in the worst case the lock of a frozen sweeper, which
Postgres takes away (5 s).
"""
RUNS = 8


class Victim:
    """The process that reached the failpoint, and what happens to it then."""

    def __init__(self, rig: Rig, failpoint: Failpoint, action: str) -> None:
        self._rig = rig
        self._failpoint = failpoint
        self._action = action
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self.process: Process | None = None

    def _watch(self) -> None:
        while (pid := self._failpoint.victim) is None:
            time.sleep(0.01)
        self.process = process = self._rig.process_of(pid)
        if self._action == KILL:
            process.wait(5)
            process.start()  # as the platform does
        elif process is self._rig.api:
            time.sleep(LEASE_SECONDS + 1)
            process.resume()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The failpoint is armed, and has to be reached."""
        self._failpoint.arm(self._action)
        self._watcher.start()
        try:
            yield
            self._watcher.join(20)
            assert self.process is not None, "nobody came to the failpoint"
        finally:
            self._failpoint.disarm()

    def awake(self) -> None:
        """Let it go on where it was frozen, and give it the time to do harm."""
        if self._action == FREEZE and self.process is not None:
            self.process.resume()
            time.sleep(LEASE_SECONDS / 2)

    def gone(self) -> None:
        """Wait until it has ended, as it was told to before it came to the failpoint."""
        if self._action == FREEZE and self.process is not None:
            self.process.wait(DRAIN_SECONDS + 5)


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
    "after_cancel": when_somebody_cancels,
}
"""Where it takes more than load to get there."""


@pytest.mark.parametrize("action", [KILL, FREEZE])
@pytest.mark.parametrize("name", failpoints.names())
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
