"""Accepting while Redis or Postgres is away."""

import time
from datetime import UTC, datetime
from uuid import uuid4

import httpx
import pytest

from tests.faults.conftest import Hold
from tests.faults.rig import SCENARIO, Rig

ACCEPTED = 60
FIRST_FAILURES = 5
"""These may take longer: somebody has to find out that Redis is away."""


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_accepting_stays_quick_while_redis_is(rig: Rig, holds: Hold, how: str) -> None:
    rig.valkey.kill() if how == "killed" else rig.valkey.pause()
    took, runs = [], []
    try:
        for _ in range(ACCEPTED):
            began = time.monotonic()
            runs += rig.submit(1, text=SCENARIO)
            took.append(time.monotonic() - began)
    finally:
        rig.valkey.start() if how == "killed" else rig.valkey.resume()
    back = datetime.now(UTC)
    quick = sorted(took[FIRST_FAILURES:])
    assert quick[int(0.95 * len(quick))] < 0.1

    rig.settle(runs)
    [row] = rig.rows("SELECT max(started_at) AS last FROM runs WHERE id = ANY(%s::uuid[])", [runs])
    assert (row["last"] - back).total_seconds() < 10
    holds("Redis away at intake", how, runs)


def test_without_postgres_a_submission_is_refused_and_leaves_nothing(rig: Rig) -> None:
    before = rig.now()
    headers = {"Idempotency-Key": str(uuid4())}

    def post() -> httpx.Response:
        return rig.client.post("/v1/runs", json={"agent": "bookkeeper", "input": SCENARIO}, headers=headers)

    rig.postgres.kill()
    try:
        refused = post()
    finally:
        rig.postgres.start()
    assert refused.status_code == 503
    assert refused.headers["Content-Type"] == "application/problem+json"
    assert int(refused.headers["Retry-After"]) >= 1
    assert rig.runs_since(before) == []
    assert post().status_code == 202
    rig.settle(rig.runs_since(before))
