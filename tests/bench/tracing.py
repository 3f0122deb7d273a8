"""What tracing costs: the scenario without it, to one back end, to four, and to four that hang.

That is less than a machine's speed changes from one minute to the next. So whole services, each with its own settings,
are there at the same time, and take turns of two seconds.
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

from app.db.migrate import upgrade
from app.devstack.access import make_key
from app.devstack.processes import Process
from app.devstack.stack import ROOT, Stack
from tests.bench.client import Client
from tests.bench.scenario import TURNS, Row, run_scenario
from tests.otlp import Kind, Mode
from worker.exporters.delivery import ATTEMPT_SECONDS

SPANS = 1 + 1 + TURNS + (TURNS - 1)
"""Of one run: the root, its wait in the queue, the model's replies, the calls between them."""
WARM_UP_RUNS = 60
SETTLE_SECONDS = 2.5
"""After which the last batch has been sent."""
HANGING_SECONDS = ATTEMPT_SECONDS + SETTLE_SECONDS
"""After which it is known that a back end hangs."""
TURN_RUNS = 60
TURNS_A_ROUND = 8


@dataclass(frozen=True)
class Turns:
    """Of one service, turn by turn: runs a second, and CPU milliseconds of its worker for each run."""

    speeds: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


async def measure_tracing(stack: Stack, rounds: int) -> list[Row]:
    """Rows: what, figure, goal, peers."""
    with back_ends(Mode.OK) as well, back_ends(Mode.HANG) as hanging:
        stack.worker.stop()
        try:
            measured = await _beside(
                stack,
                {
                    "off": {},
                    "hanging": _all(hanging),
                    "phoenix": well["phoenix"],
                    "langfuse": well["langfuse"],
                    "four": _all(well),
                },
                rounds=rounds,
            )
        finally:
            stack.worker.start()
    off = measured["off"]
    return [
        ("tracing off: runs per second", f"{statistics.median(off.speeds):.1f}", "", ""),
        ("tracing off: CPU of the worker, ms a run", f"{statistics.median(off.cpu_ms):.2f}", "", ""),
        ("four back ends that hang: runs per second", _change(off, measured["hanging"]), "≥ - 3 %", ""),
        ("four back ends: runs per second", _change(off, measured["four"]), "", ""),
        ("CPU of the worker, ms a span: to Phoenix", _a_span(off, measured["phoenix"]), "≤ 1", ""),
        ("CPU of the worker, ms a span: to Langfuse", _a_span(off, measured["langfuse"]), "≤ 1", ""),
        ("CPU of the worker, ms a span: to all four", _a_span(off, measured["four"]), "", ""),
    ]


async def _beside(stack: Stack, ways: Mapping[str, Mapping[str, str]], *, rounds: int) -> dict[str, Turns]:
    """Whole services that are there at the same time, each with its settings, in short turns."""
    measured = {name: Turns() for name in ways}
    async with AsyncExitStack() as there:
        services = {}
        for number, (name, settings) in enumerate(ways.items(), 3):
            services[name] = await there.enter_async_context(_service(stack, name, number, settings))
        for _ in range(rounds):
            for client, worker in services.values():
                worker.restart()  # two processes of the same settings differ, too: by a tenth
                await run_scenario(client, WARM_UP_RUNS)
            await asyncio.sleep(HANGING_SECONDS)
            for turn in range(TURNS_A_ROUND):
                # Now in one order and now in the other: nobody always comes after the same one.
                for name in list(ways) if turn % 2 == 0 else reversed(list(ways)):
                    client, worker = services[name]
                    before = _cpu_seconds(worker)
                    measured[name].speeds.append(await run_scenario(client, TURN_RUNS))
                    await asyncio.sleep(SETTLE_SECONDS)
                    measured[name].cpu_ms.append((_cpu_seconds(worker) - before) * 1000 / TURN_RUNS)
    return measured


@asynccontextmanager
async def _service(
    stack: Stack, name: str, number: int, settings: Mapping[str, str]
) -> AsyncIterator[tuple[Client, Process]]:
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
            yield client, worker
    finally:
        worker.stop()
        api.stop()


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


def _change(off: Turns, on: Turns) -> str:
    """The median of what changed from one turn to the next: whatever else the machine does changes more slowly."""
    return f"{statistics.median(new / old for old, new in zip(off.speeds, on.speeds, strict=True)) - 1:+.1%}"


def _a_span(off: Turns, on: Turns) -> str:
    spent = [with_it - without for without, with_it in zip(off.cpu_ms, on.cpu_ms, strict=True)]
    return f"{statistics.median(spent) / SPANS:.2f}"
