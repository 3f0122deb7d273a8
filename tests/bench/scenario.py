"""The peers' scenario: 200 runs of 4 model calls of 50 ms and 3 tool calls, submitted 10 at a time."""

import asyncio
import statistics
import time
from contextlib import suppress

import psutil

from app.devstack.stack import Stack
from tests.bench.client import Client, in_parallel, quantile

SCENARIO = "bench:4:0.05"
TURNS = 4
RUNS = 200
SUBMITTERS = 10

Row = tuple[str, str, str, str]


async def measure_scenario(stack: Stack, key: str, rounds: int) -> list[Row]:
    """Rows: what, figure, goal, peers."""
    speeds: list[float] = []
    accepts: list[float] = []
    used: dict[str, float] = {}
    async with Client(stack.api.address, key) as client:
        await run_scenario(client, 20)
        for _ in range(rounds):
            client.took.clear()
            before = cpu_of(stack)
            speeds.append(await run_scenario(client, RUNS))
            for name, seconds in cpu_of(stack).items():
                used[name] = used.get(name, 0.0) + seconds - before[name]
            accepts += client.took["accept"]
    accept = f"{quantile(accepts, 0.5):.1f} / {quantile(accepts, 0.95):.1f}"
    a_run = {name: seconds * 1000 / (RUNS * rounds) for name, seconds in used.items()}
    return [
        ("scenario: runs per second", f"{statistics.median(speeds):.1f}", "≥ 32", "3.4 to 10.5"),
        ("scenario: accept p50 / p95, ms", accept, "≤ 15 / 40", "62 to 708 / 113 to 1154"),
        *((f"scenario: CPU of the {name}, ms a run", f"{spent:.1f}", "", "") for name, spent in a_run.items()),
        ("scenario: CPU of the worker, ms a loop turn", f"{a_run['worker'] / TURNS:.1f}", "≤ 8", ""),
    ]


async def measure_workers(stack: Stack, key: str, rounds: int) -> list[Row]:
    """The same with one worker and with two, in turns."""
    other = stack.another_worker("second")
    alone: list[float] = []
    together: list[float] = []
    async with Client(stack.api.address, key) as client:
        for _ in range(rounds):
            alone.append(RUNS / await run_scenario(client, RUNS))
            other.start()
            try:
                await run_scenario(client, 20)
                together.append(RUNS / await run_scenario(client, RUNS))
            finally:
                other.stop()
    one, two = statistics.median(alone), statistics.median(together)
    return [(f"{RUNS} runs: one worker → two, s", f"{one:.2f} → {two:.2f}", "faster", f"{two / one - 1:+.0%}")]


async def run_scenario(client: Client, runs: int) -> float:
    """Runs per second, from the first submission to the last end."""
    began = time.perf_counter()
    submitted = await in_parallel(SUBMITTERS, [lambda: client.submit("bench", SCENARIO)] * runs)
    ended = await asyncio.gather(*(client.wait(run["id"]) for run in submitted))
    took = time.perf_counter() - began
    wrong = [run for run in ended if run["status"] != "succeeded" or run["usage"]["model_calls"] != TURNS]
    if wrong:
        raise RuntimeError(f"{len(wrong)} runs went wrong, the first: {wrong[0]}")
    return runs / took


def cpu_of(stack: Stack) -> dict[str, float]:
    """CPU seconds of each part so far, with its children, and of this client."""
    seconds = {process.name: _cpu(psutil.Process(process.pid)) for process in stack.processes}
    ours = psutil.Process().cpu_times()
    return {**seconds, "client": ours.user + ours.system}


def _cpu(process: psutil.Process) -> float:
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total
