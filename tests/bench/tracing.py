"""What tracing costs: the scenario without it, to one back end and to four, in turns; and beside four that hang.

That last one costs less than a machine's speed changes from one minute to the next. So two whole services, one without
tracing and one whose back ends hang, are there at the same time, and take turns of two seconds.
"""

import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import psutil
import psycopg

from app.db.migrate import upgrade
from app.devstack.access import make_key
from app.devstack.processes import Process
from app.devstack.stack import ROOT, Stack
from tests.bench.client import Client
from tests.bench.scenario import RUNS, TURNS, Row, run_scenario
from tests.otlp import Kind, Mode
from worker.exporters.delivery import ATTEMPT_SECONDS

SPANS = 1 + 1 + TURNS + (TURNS - 1)
"""Of one run: the root, its wait in the queue, the model's replies, the calls between them."""
WARM_UP_RUNS = 60
SETTLE_SECONDS = 2.5
"""After which the last batch has been sent."""
HANGING_SECONDS = ATTEMPT_SECONDS + SETTLE_SECONDS
"""After which it is known that a back end hangs."""
SHORT_RUNS = 60
PAIRS = 8
"""Of short turns, in a round."""


@dataclass
class Figures:
    """Of one way to trace, over all rounds: runs a second, and CPU milliseconds of the worker for each run."""

    settings: Mapping[str, str]
    speeds: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


async def measure_tracing(stack: Stack, key: str, rounds: int) -> list[Row]:
    """Rows: what, figure, goal, peers."""
    with back_ends(Mode.OK) as well, back_ends(Mode.HANG) as hanging:
        ways = {
            "off": Figures({}),
            "phoenix": Figures(well["phoenix"]),
            "langfuse": Figures(well["langfuse"]),
            "four": Figures(_all(well)),
        }
        stack.worker.stop()
        try:
            async with Client(stack.api.address, key) as client:
                for number in range(rounds):
                    # Now in one order and now in the other: what is measured first is not always the same.
                    for name in list(ways) if number % 2 == 0 else reversed(ways):
                        await _measure(stack, client, ways[name])
            beside = await _beside(stack, {"off": {}, "hanging": _all(hanging)}, rounds)
        finally:
            stack.worker.start()
    off = ways["off"]
    return [
        ("tracing off: runs per second", f"{statistics.median(off.speeds):.1f}", "", ""),
        ("tracing off: CPU of the worker, ms a run", f"{statistics.median(off.cpu_ms):.2f}", "", ""),
        ("four back ends that hang: runs per second", _change(beside["off"], beside["hanging"]), "≥ - 3 %", ""),
        ("four back ends: runs per second", _change(off.speeds, ways["four"].speeds), "", ""),
        ("CPU of the worker, ms a span: to Phoenix", _a_span(off, ways["phoenix"]), "≤ 1", ""),
        ("CPU of the worker, ms a span: to Langfuse", _a_span(off, ways["langfuse"]), "≤ 1", ""),
        ("CPU of the worker, ms a span: to all four", _a_span(off, ways["four"]), "", ""),
    ]


async def _beside(stack: Stack, ways: Mapping[str, Mapping[str, str]], rounds: int) -> dict[str, list[float]]:
    """Runs a second of whole services that are there at the same time, each with its settings, in short turns."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    async with AsyncExitStack() as there:
        clients = {}
        for number, (name, settings) in enumerate(ways.items(), 3):
            clients[name] = await there.enter_async_context(_service(stack, name, number, settings))
            await run_scenario(clients[name], WARM_UP_RUNS)
        await asyncio.sleep(HANGING_SECONDS)
        for number in range(PAIRS * rounds):
            for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
                speeds[name].append(await run_scenario(clients[name], SHORT_RUNS))
    return speeds


@asynccontextmanager
async def _service(stack: Stack, name: str, number: int, settings: Mapping[str, str]) -> AsyncIterator[Client]:
    """Another API and worker on servers of the same stack, with a database of their own."""
    owner_url = stack.postgres.create_database(f"bench_{name}")
    upgrade(owner_url)
    url = stack.postgres.service_url(f"bench_{name}")
    env = {"DATABASE_URL": url, "REDIS_URL": stack.valkey.url(number)}
    api, worker = stack.another_api(f"{name}-api", **env), stack.another_worker(f"{name}-worker", **env, **settings)
    try:
        api.start()
        worker.start()
        key = await asyncio.to_thread(make_key, url, tenant="bench", name="bench")
        async with Client(api.address, key) as client:
            yield client
    finally:
        worker.stop()
        api.stop()


async def _measure(stack: Stack, client: Client, figures: Figures) -> None:
    worker = stack.another_worker("traced", **figures.settings)
    worker.start()
    try:
        await run_scenario(client, WARM_UP_RUNS)
        await asyncio.sleep(SETTLE_SECONDS)
        # What the runs before have left behind is not cleared away during some of the measurements.
        with psycopg.connect(stack.owner_url, autocommit=True) as postgres:
            postgres.execute("VACUUM ANALYZE")
        before = _cpu_seconds(worker)
        figures.speeds.append(await run_scenario(client, RUNS))
        await asyncio.sleep(SETTLE_SECONDS)
        figures.cpu_ms.append((_cpu_seconds(worker) - before) * 1000 / RUNS)
    finally:
        worker.stop()


@contextmanager
def back_ends(mode: Mode) -> Iterator[dict[Kind, dict[str, str]]]:
    """All four, in a process of their own: its CPU is not the worker's. Their settings, by kind."""
    command = [sys.executable, "-m", "tests.otlp", mode]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        settings: dict[Kind, dict[str, str]] = json.loads(process.stdout.readline())
        yield settings
        process.stdin.close()
        if process.wait(10) != 0:
            raise RuntimeError("the back ends were not sent what they must be")


def _all(back_ends: Mapping[Kind, Mapping[str, str]]) -> dict[str, str]:
    return {name: value for settings in back_ends.values() for name, value in settings.items()}


def _cpu_seconds(process: Process) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def _change(before: list[float], after: list[float]) -> str:
    """The median of what changed within a round: whatever else the machine does changes between rounds."""
    return f"{statistics.median(new / old for old, new in zip(before, after, strict=True)) - 1:+.1%}"


def _a_span(off: Figures, on: Figures) -> str:
    spent = [with_it - without for without, with_it in zip(off.cpu_ms, on.cpu_ms, strict=True)]
    return f"{statistics.median(spent) / SPANS:.2f}"
