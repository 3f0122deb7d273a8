"""Several who want the same run at the same moment."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tests.faults.conftest import Hold
from tests.faults.rig import SCENARIO, Rig


def test_a_cancel_and_an_end_at_the_same_moment_have_one_winner_and_everybody_hears_which(
    rig: Rig, holds: Hold
) -> None:
    runs = []
    answers: dict[str, int] = {}

    def cancel(run_id: str, after: float) -> None:
        time.sleep(after)
        answers[run_id] = rig.client.post(f"/v1/runs/{run_id}/cancel").status_code

    with ThreadPoolExecutor(8) as cancellers:
        for number in range(40):
            [run_id] = rig.submit(1, text="bench:1:0.2")
            runs.append(run_id)
            cancellers.submit(cancel, run_id, 0.1 + number * 0.01)
    rig.settle(runs)
    ended = {
        str(row["id"]): row["status"]
        for row in rig.rows("SELECT id, status FROM runs WHERE created_at > now() - interval '1 minute'")
    }
    for run_id in runs:
        assert (answers[run_id], ended[run_id]) in ((202, "cancelled"), (409, "succeeded"))
    assert len({ended[run_id] for run_id in runs}) == 2, "no race: the same side won every time"
    holds("cancel against an end", "race", runs)


def test_four_workers_lose_nothing_and_share_the_work(rig: Rig, holds: Hold) -> None:
    more = [rig.another_worker(name) for name in ("third", "fourth")]
    try:
        for worker in more:
            worker.start()
        runs = rig.submit(60, text=SCENARIO)
        more[0].kill()
        runs += rig.submit(60, text=SCENARIO)
        rig.settle(runs)
    finally:
        for worker in more:
            worker.stop()
    executed = Counter(row["worker"] for row in rig.rows("SELECT worker FROM runs WHERE id = ANY(%s::uuid[])", [runs]))
    assert len(executed) >= 3
    holds("one of four workers is killed", "under load", runs)
