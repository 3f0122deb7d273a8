"""The sealer dies at each of its points: no event stays unsealed, and the audit still verifies."""

import subprocess
import sys

import pytest

from tests.faults.conftest import Hold
from tests.faults.failpoints import KILL
from tests.faults.rig import Rig

POINTS = ["seal_stored", "seal_before_anchor", "seal_after_anchor"]


def seal(rig: Rig) -> int:
    """One round, in a process of its own: its exit code."""
    command = [sys.executable, "-m", "tests.faults.failpoints", "sealer"]
    assert rig.worker.env is not None
    env = {**rig.worker.env, **rig.sealing_env}
    return subprocess.run(command, env=env, timeout=60, check=False, capture_output=True).returncode


@pytest.mark.parametrize("name", POINTS)
def test_every_event_is_sealed_although_the_sealer_is_killed_at(rig: Rig, holds: Hold, name: str) -> None:
    runs: list[str] = []
    failpoint = rig.failpoint(name)
    failpoint.arm(KILL)
    try:
        while failpoint.victim is None:  # ours, or a worker whose minute is over
            assert len(runs) < 30, "nobody came to the failpoint"
            runs += rig.submit(3)
            rig.settle(runs)
            seal(rig)
    finally:
        failpoint.disarm()
    rig.heal()
    rig.until(lambda: seal(rig) == 0 and is_sealed(rig), seconds=30)
    assert rig.verify_audit()["findings"] == []
    holds("kill -9 of the sealer", name, runs)


def is_sealed(rig: Rig) -> bool:
    report = rig.verify_audit()
    return (report["unsealed"], report["unanchored"]) == (0, 0)
