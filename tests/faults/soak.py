"""`make soak`: thousands of runs while workers, Valkey and Postgres are killed every 5 to 20 seconds.

    make soak MINUTES=15 ARGS="--seed 7"

Ends with everything that has to be true of the runs, and a table. Exit code 1 where something is not.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random, SystemRandom

from app.devstack.processes import Reaper
from tests.faults.inflict import FAULTS
from tests.faults.invariants import broken
from tests.faults.ledger import Ledger
from tests.faults.load import Load
from tests.faults.rig import Rig
from tests.stack import new_directory

KILLS = ("a worker is killed", "Valkey is killed", "Postgres is killed")
OPEN_RUNS = 60
PROGRESS_SECONDS = 30


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(2**32), help="replays a schedule")
    parser.add_argument("--every-fault", action="store_true", help="all of the fault suite's, not only kills")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.minutes:g} minutes", flush=True)
    with new_directory() as directory, Reaper() as reaper, Ledger() as ledger:
        rig = Rig(Path(directory), reaper, ledger)
        try:
            rig.start()
            return soak(rig, Random(options.seed), options.minutes * 60, every_fault=options.every_fault)
        finally:
            rig.stop()


def soak(rig: Rig, random: Random, seconds: float, *, every_fault: bool) -> int:
    """The exit code."""
    before, began = rig.now(), time.monotonic()
    faults = [fault for fault in FAULTS if every_fault or fault.name in KILLS]
    inflicted: Counter[str] = Counter()
    load = Load(rig, open_runs=OPEN_RUNS)
    told_at = began
    with load.coming():
        while time.monotonic() - began < seconds:
            time.sleep(random.uniform(5, 20))
            fault = random.choice(faults)
            fault.inflict(rig, random)
            inflicted[fault.name] += 1
            if time.monotonic() - told_at > PROGRESS_SECONDS:
                told_at = time.monotonic()
                print(f"{told_at - began:5.0f} s  {len(load.accepted):6} runs accepted  {fault.name}", flush=True)
    rig.heal()
    runs = sorted({*load.accepted, *rig.runs_since(before)})
    last = rig.settle(runs, seconds=120)
    took = time.monotonic() - began
    found = broken(rig, runs)
    audit = rig.verify_audit()
    found.wrong += [str(finding) for finding in audit["findings"]]

    ends = rig.rows(
        """
        SELECT status || ': ' || stop_reason AS ending, count(*) AS runs, sum(attempt - 1) AS resumed
        FROM runs WHERE id = ANY(%s::uuid[]) GROUP BY 1 ORDER BY 2 DESC
        """,
        [runs],
    )
    takeovers = rig.takeovers(runs)
    print(f"\n{'runs':32}{len(runs):8}  in {took / 60:.1f} minutes, {len(runs) / took:.1f} a second")
    for row in ends:
        print(f"  {row['ending']:30}{row['runs']:8}  resumed {row['resumed']} times")
    for name, times in sorted(inflicted.items()):
        print(f"{name:32}{times:8}")
    if takeovers:
        print(
            f"{'taken over':32}{len(takeovers):8}  after a lost lease: p50 {statistics.median(takeovers):.1f} s,"
            f" max {max(takeovers):.1f} s, from the last write to the next claim"
        )
    print(f"{'asked a person (in doubt)':32}{reviews(rig, runs):8}")
    print(f"{'last run ended after, s':32}{last:8.1f}")
    print(f"{'audit events verified':32}{audit['events']:8}  sealed in {audit['checkpoints']} checkpoints")
    for what, items in (("lost", found.lost), ("doubled", found.doubled), ("otherwise wrong", found.wrong)):
        print(f"{what:32}{len(items):8}")
    for line in found.all[:50]:
        print(f"  {line}")
    return 1 if found.all else 0


def reviews(rig: Rig, runs: list[str]) -> int:
    return int(rig.rows("SELECT count(*) AS n FROM reviews WHERE run_id = ANY(%s::uuid[])", [runs])[0]["n"])


if __name__ == "__main__":
    sys.exit(main())
