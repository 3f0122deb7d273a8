"""What goes wrong around the service: its processes, its servers, the network, the provider. One fault at a time."""

from random import Random

import pytest

from tests.faults.conftest import Hold
from tests.faults.inflict import FAULTS, Fault
from tests.faults.rig import SCENARIO, Rig
from tests.scripts import DONE, Script, call

RUNS = 12
RECOVERY_SECONDS = 20.0
"""After the end of a fault: a lease, a sweep, reconnecting, and the runs themselves."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_no_run_is_lost_and_no_effect_doubled_when(rig: Rig, holds: Hold, fault: Fault) -> None:
    before = rig.now()
    slow = rig.submit(RUNS // 2, text="bench:4:0.5")
    rig.until(lambda: "running" in rig.open_of(slow).values())
    quick = rig.submit(RUNS // 2, text=SCENARIO)
    fault.inflict(rig, Random(fault.name))
    runs = sorted({*slow, *quick, *rig.runs_since(before)})
    rig.settle(runs, seconds=RECOVERY_SECONDS)
    holds(fault.kind, fault.name, runs)


def test_a_decision_whose_commit_was_never_confirmed_counts_once(rig: Rig, holds: Hold) -> None:
    runs = rig.submit(1, agent="toolbox", text=Script(rig.model_url, [call("open_the_door"), DONE]).input)
    rig.until(lambda: rig.open_of(runs) == {runs[0]: "waiting"})
    [review] = rig.rows("SELECT id, args_hash FROM reviews WHERE run_id = %s", runs)
    verdict = {"decision": "approve", "args_hash": review["args_hash"]}
    for worker in rig.workers:
        worker.pause()  # their sweepers commit as well
    try:
        # The end of a transaction, and not the beginning of one that is READ COMMITTED.
        swallowed = rig.postgres_proxy.swallow("COMMIT", replies=lambda reply: b"COMMIT\0" in reply)
        unheard = rig.reviewer.post(f"/v1/reviews/{review['id']}/decision", json=verdict)
        swallowed.wait(5)
    finally:
        for worker in rig.workers:
            worker.resume()
    assert unheard.status_code == 503
    again = rig.reviewer.post(f"/v1/reviews/{review['id']}/decision", json=verdict)
    assert (again.status_code, again.json()["type"]) == (409, "urn:agent-service:problem:review-decided")
    rig.settle(runs)
    holds("lost reply of Postgres", "the reply to a decision's COMMIT is lost", runs)
