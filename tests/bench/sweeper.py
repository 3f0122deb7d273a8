"""The sweeper with 100,000 queued runs, in this process, on a database and a Redis of its own."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import redis
import uvloop
from prometheus_client import CollectorRegistry

from app.background import in_background
from app.db.engine import make_engine
from app.db.migrate import upgrade
from app.devstack.stack import Stack
from app.queue import RunQueue
from app.signals import Signals
from worker.metrics import WorkerMetrics
from worker.sweeper import Sweeper

QUEUED = 100_000
REDIS_DATABASE = 3
TICK_SECONDS = 0.005

Row = tuple[str, str, str]


def measure_sweeper(stack: Stack) -> list[Row]:
    """Rows: what, figure, goal."""
    database_url = stack.postgres.create_database("bench_sweeper")
    upgrade(database_url)
    fill_queue(database_url)
    return uvloop.run(_measure(database_url, stack.valkey.url(REDIS_DATABASE)))


async def _measure(database_url: str, redis_url: str) -> list[Row]:
    engine = make_engine(database_url, pool_size=4, application_name="bench")
    queue, signals = RunQueue(redis_url), Signals(redis_url)
    sweeper = Sweeper(engine, queue, signals, WorkerMetrics(CollectorRegistry(), {}, model=None))
    try:
        async with in_background(sweeper.keep_sweeping()):
            await _filled(queue)
            async with a_ticker() as late:
                with redis.Redis.from_url(redis_url) as connection:
                    connection.flushdb()
                began = time.perf_counter()
                await _filled(queue)
                refill, late_in_refill = time.perf_counter() - began, max(late)
        async with a_ticker() as late:
            comparisons = [await _timed_sweep(sweeper, queue, is_due=True) for _ in range(5)]
            late_in_comparison = max(late)
            late.clear()
            sweeps = [await _timed_sweep(sweeper, queue, is_due=False) for _ in range(30)]
            late_in_sweep = max(late)
    finally:
        queue.close()
        await signals.aclose()
        await engine.dispose()
    what = f"{QUEUED} queued runs"
    return [
        (f"{what}: a sweep p50, ms", f"{statistics.median(sweeps):.0f}", "≤ 20"),
        (f"{what}: it blocks the loop for, ms", f"{late_in_sweep:.0f}", "≤ 20"),
        (f"{what}: a sweep that compares, ms", f"{statistics.median(comparisons):.0f}", "≤ 1000"),
        (f"{what}: it blocks the loop for, ms", f"{late_in_comparison:.0f}", "≤ 50"),
        (f"{what}: flush to refilled, s", f"{refill:.1f}", "≤ 60"),
        (f"{what}: it blocks the loop for, ms", f"{late_in_refill:.0f}", "≤ 50"),
    ]


async def _filled(queue: RunQueue) -> None:
    while await asyncio.to_thread(queue.length) < QUEUED:
        await asyncio.sleep(0.05)


async def _timed_sweep(sweeper: Sweeper, queue: RunQueue, *, is_due: bool) -> float:
    """Milliseconds."""
    queue.note_complete(0.001 if is_due else 60)
    await asyncio.sleep(0.01)
    began = time.perf_counter()
    await sweeper.sweep()
    return (time.perf_counter() - began) * 1000


@asynccontextmanager
async def a_ticker() -> AsyncIterator[list[float]]:
    """How much later than it should (milliseconds) a task is woken, each time, that does nothing but sleep."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(TICK_SECONDS)
            late.append((time.perf_counter() - began - TICK_SECONDS) * 1000)

    async with in_background(tick()):
        yield late


def fill_queue(database_url: str) -> None:
    """Queued runs of an hour ago."""
    statement = """
        INSERT INTO runs (id, tenant, api_key_id, request_id, agent, agent_version, input, metadata, limits, priority,
                          request_hash, status, queued_at)
        SELECT (lpad(to_hex(1700000000000 + number), 12, '0') || '70008' || lpad(to_hex(number), 15, '0'))::uuid,
               'bench', 'k', 'r', 'bench', '1', to_jsonb(repeat('x', 200)), '{}', '{"max_steps": 10}', 0,
               '\\x00', 'queued', now() - interval '1 hour'
        FROM generate_series(1, %s) AS number
    """
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(statement, [QUEUED])
        connection.execute("ANALYZE runs")  # as autovacuum would within a minute
