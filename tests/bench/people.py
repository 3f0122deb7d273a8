"""10,000 runs that wait for people: what they cost, and how soon one goes on when somebody has decided."""

import asyncio
import time
from collections.abc import Sequence

import aiohttp
import psycopg
from prometheus_client import CollectorRegistry
from psycopg.rows import dict_row

from app.db.engine import make_engine
from app.devstack.access import make_key
from app.devstack.stack import Stack
from app.domain.principal import Scope
from app.queue import RunQueue
from app.signals import Signals
from tests.bench.client import Client, in_parallel, quantile
from tests.bench.waiting import connections_of, pss
from worker.metrics import WorkerMetrics
from worker.sweeper import Sweeper

WAITING = 10_000
DECISIONS = 300
DECISIONS_PER_SECOND = 20
SWEEPS = 30

Row = tuple[str, str, str]


async def measure_people(stack: Stack, key: str) -> list[Row]:
    """Rows: what, figure, goal."""
    without = await _costs(stack, "nobody-waits")
    async with Client(stack.api.address, key) as client:
        await in_parallel(20, [lambda: client.submit("doorkeeper", "bench:2:0.001")] * WAITING)
    while _count(stack, "waiting") < WAITING:
        await asyncio.sleep(0.5)
    with psycopg.connect(stack.owner_url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE runs, reviews, audit_heads")  # as autovacuum would within a minute
    with_them = await _costs(stack, "all-wait")
    resumed = await _decide(stack)
    rows = [
        (f"{WAITING} runs wait for people: {what}", f"{before} → {after}", "no more")
        for (what, before), after in zip(without.items(), with_them.values(), strict=True)
    ]
    figure = f"{quantile(resumed, 0.5):.2f} / {quantile(resumed, 0.95):.2f} / {max(resumed):.2f}"
    return [*rows, ("… decision to resumed run p50 / p95 / max, s", figure, "p95 ≤ 2")]


async def _costs(stack: Stack, name: str) -> dict[str, str]:
    """Of a worker that was just started."""
    worker = stack.another_worker(name)
    worker.start()
    try:
        await asyncio.sleep(5)
        return {
            "memory of a worker, MB (PSS)": f"{pss(worker):.0f}",
            "connections of a worker": str(connections_of(stack, worker)),
            "a sweep p50, ms": f"{await _sweep_ms(stack):.1f}",
        }
    finally:
        worker.stop()


async def _sweep_ms(stack: Stack) -> float:
    engine = make_engine(stack.database_url, pool_size=4, application_name="bench")
    queue, signals = RunQueue(stack.redis_url), Signals(stack.redis_url)
    sweeper = Sweeper(engine, queue, signals, WorkerMetrics(CollectorRegistry(), {}, model=None))
    took = []
    try:
        for _ in range(SWEEPS):
            began = time.perf_counter()
            await sweeper.sweep()
            took.append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(0.05)
    finally:
        queue.close()
        await signals.aclose()
        await engine.dispose()
    return quantile(took, 0.5)


def _count(stack: Stack, status: str) -> int:
    with psycopg.connect(stack.database_url) as connection:
        row = connection.execute("SELECT count(*) FROM runs WHERE status = %s", [status]).fetchone()
    assert row is not None
    return int(row[0])


async def _decide(stack: Stack) -> list[float]:
    """Approve some, one after the other, and return how long each took (seconds) until a worker had its run."""
    scopes = (Scope.REVIEWS_READ, Scope.REVIEWS_DECIDE)
    key = await asyncio.to_thread(make_key, stack.database_url, tenant="bench", name="reviewer", scopes=scopes)
    with psycopg.connect(stack.database_url, row_factory=dict_row) as connection:
        reviews = connection.execute(
            "SELECT id, run_id, args_hash FROM reviews WHERE status = 'pending' ORDER BY random() LIMIT %s", [DECISIONS]
        ).fetchall()
    async with aiohttp.ClientSession(stack.api.address, headers={"Authorization": f"Bearer {key}"}) as session:
        for review in reviews:
            body = {"decision": "approve", "args_hash": review["args_hash"]}
            async with session.post(f"/v1/reviews/{review['id']}/decision", json=body) as answer:
                if answer.status != 200:
                    raise RuntimeError(await answer.text())
            await asyncio.sleep(1 / DECISIONS_PER_SECOND)
    await asyncio.sleep(3)
    return _resumed_after(stack, [review["run_id"] for review in reviews])


def _resumed_after(stack: Stack, run_ids: Sequence[object]) -> list[float]:
    with psycopg.connect(stack.database_url, row_factory=dict_row) as connection:
        rows = connection.execute(
            """
            SELECT extract(epoch FROM claimed.at - decided.at) AS seconds
            FROM audit_events AS decided
            LEFT JOIN LATERAL (SELECT at FROM audit_events AS later
                               WHERE later.run_id = decided.run_id AND later.seq > decided.seq
                                 AND later.kind = 'run.claimed' ORDER BY later.seq LIMIT 1) AS claimed ON true
            WHERE decided.kind = 'review.decided' AND decided.run_id = ANY(%s)
            """,
            [list(run_ids)],
        ).fetchall()
    if len(rows) != len(run_ids) or any(row["seconds"] is None for row in rows):
        raise RuntimeError("not every decided run went on")
    return [float(row["seconds"]) for row in rows]
