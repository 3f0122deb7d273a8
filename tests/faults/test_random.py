"""Faults by chance, two at a time, under steady load. `FAULT_SEED=…` replays a schedule."""

import os
import threading
import time
from collections.abc import Sequence
from random import Random, SystemRandom

from tests.faults.conftest import Hold
from tests.faults.inflict import FAULTS, Fault
from tests.faults.load import Load
from tests.faults.rig import Rig

SEED = int(os.environ.get("FAULT_SEED") or SystemRandom().randrange(2**32))
FAULTS_PER_LANE = 5
OURS = [fault for fault in FAULTS if fault.kind in ("worker", "API", "provider")]
THEIRS = [fault for fault in FAULTS if fault not in OURS]
"""Postgres, Valkey and the network; one lane each, so that no fault undoes what another is about."""


class Lane(threading.Thread):
    """Inflicts faults, one after the other."""

    def __init__(self, rig: Rig, faults: Sequence[Fault], seed: int) -> None:
        super().__init__(daemon=True)
        self._rig = rig
        self._random = Random(seed)
        self.schedule = [self._random.choice(faults) for _ in range(FAULTS_PER_LANE)]
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            for fault in self.schedule:
                time.sleep(self._random.uniform(0, 1))
                fault.inflict(self._rig, self._random)
        except BaseException as error:
            self.failure = error
            raise


def test_no_run_is_lost_and_no_effect_doubled_whatever_comes(rig: Rig, holds: Hold) -> None:
    print(f"FAULT_SEED={SEED}")
    before = rig.now()
    lanes = [Lane(rig, OURS, SEED), Lane(rig, THEIRS, SEED + 1)]
    load = Load(rig, open_runs=20)
    with load.coming():
        for lane in lanes:
            print(f"{', then '.join(fault.name for fault in lane.schedule)}")
            lane.start()
        for lane in lanes:
            lane.join()
    assert [lane.failure for lane in lanes] == [None, None]
    rig.heal()
    runs = sorted({*load.accepted, *rig.runs_since(before)})
    rig.settle(runs, seconds=40)
    holds(f"random, seed {SEED}", "all", runs)
    assert rig.verify_audit()["findings"] == []
