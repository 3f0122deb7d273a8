"""The peers' crash scenario: 20 runs of 4 model calls of a second each, and the worker that holds them is killed."""

import asyncio
import time

import httpx

from app.devstack.stack import Stack
from tests.bench.client import Client

RUNS = 20
SCENARIO = "bench:4:1"
CALLS = 4

Row = tuple[str, str, str, str]


async def measure_crash(stack: Stack, key: str) -> list[Row]:
    """Rows: what, figure, goal, peers. Another worker is started at the moment of the kill."""
    async with Client(stack.api.address, key) as client:
        asked = _asked(stack)
        runs = [await client.submit("bench", SCENARIO) for _ in range(RUNS)]
        await asyncio.sleep(2.5)
        other = stack.another_worker("other")
        try:
            stack.worker.kill()
            killed = time.perf_counter()
            other.start()
            ended = await asyncio.gather(*(client.wait(run["id"]) for run in runs))
            took = time.perf_counter() - killed
        finally:
            other.stop()
            stack.worker.start()
    asked = _asked(stack) - asked
    if any(run["status"] != "succeeded" or run["usage"]["model_calls"] != CALLS for run in ended):
        raise RuntimeError(f"not all went on from where they were: {ended}")
    return [
        ("crash: all done after the kill, s", f"{took:.1f}", "≤ 25", "33 to 38, one never"),
        (f"crash: model calls ({RUNS * CALLS} without a crash)", f"{asked}", "≤ 100", "100, 124"),
    ]


def _asked(stack: Stack) -> int:
    assert stack.model is not None
    return int(httpx.get(f"{stack.model.address}/_asked").json()["asked"])
