"""500 runs that wait for the model at the same time, in one worker process: what each of them costs."""

import asyncio
import time
from contextlib import suppress

import aiohttp
import psutil
import psycopg

from app.background import in_background
from app.devstack.processes import Process
from app.devstack.stack import Stack
from tests.bench.client import Client, in_parallel, quantile

WAITING = 500
WARM = 50
SECONDS = 30
"""How long the model takes; long enough that all of them wait before the first has its reply."""
LOOK_SECONDS = 0.02

Row = tuple[str, str, str]


async def measure_waiting(stack: Stack, key: str) -> list[Row]:
    """Rows: what, figure, goal."""
    stack.worker.stop()
    worker = stack.another_worker("waiting", WORKER_CONCURRENCY=str(WAITING))
    try:
        worker.start()
        async with Client(stack.api.address, key) as client:
            await _play(client, WARM, "bench:2:0.05")  # pools, caches and buffers have their size after that
            memory, threads = pss(worker), threads_of(worker)
            late: list[float] = []
            async with in_background(_look(f"{worker.address}/health/live", late)):
                asked = await _asked(stack)
                runs = await in_parallel(10, [lambda: client.submit("bench", f"bench:1:{SECONDS}")] * WAITING)
                while await _asked(stack) < asked + WAITING:
                    await asyncio.sleep(0.2)
                await asyncio.sleep(2)
                grown = pss(worker) - memory
                more_threads = threads_of(worker) - threads
                connections = connections_of(stack, worker)
                ended = await asyncio.gather(*(client.wait(run["id"]) for run in runs))
        if any(run["status"] != "succeeded" for run in ended):
            raise RuntimeError("not all of the waiting runs succeeded")
    finally:
        worker.stop()
        stack.worker.start()
    return [
        (f"{WAITING} waiting runs: marginal memory each, MB (PSS)", f"{grown / WAITING:.3f}", "≤ 1"),
        (f"{WAITING} waiting runs: threads more", f"{more_threads}", "0"),
        (f"{WAITING} waiting runs: connections to Postgres", f"{connections}", ""),
        ("… event loop late p99 / max, ms", f"{quantile(late, 0.99):.0f} / {max(late):.0f}", "≤ 100"),
    ]


async def _play(client: Client, runs: int, scenario: str) -> None:
    submitted = await in_parallel(10, [lambda: client.submit("bench", scenario)] * runs)
    await asyncio.gather(*(client.wait(run["id"]) for run in submitted))


async def _look(health: str, late: list[float]) -> None:
    """How long the worker's event loop takes to answer: that is at least how late it is (milliseconds)."""
    async with aiohttp.ClientSession() as session:
        while True:
            began = time.perf_counter()
            with suppress(aiohttp.ClientError):
                async with session.get(health) as answer:
                    await answer.read()
            late.append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(LOOK_SECONDS)


async def _asked(stack: Stack) -> int:
    assert stack.model is not None
    async with aiohttp.ClientSession() as session, session.get(f"{stack.model.address}/_asked") as answer:
        return int((await answer.json())["asked"])


def pss(process: Process) -> float:
    """Megabytes that are this process' own, shared ones in proportion."""
    return float(psutil.Process(process.pid).memory_full_info().pss) / 1e6


def threads_of(process: Process) -> int:
    return int(psutil.Process(process.pid).num_threads())


def connections_of(stack: Stack, worker: Process) -> int:
    with psycopg.connect(stack.database_url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'worker%%' AND application_name LIKE %s",
            [f"%-{worker.pid}-%"],
        ).fetchone()
    assert row is not None
    return int(row[0])
