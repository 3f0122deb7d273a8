"""`make bench`: one table of what was measured, beside the goals and the peers' figures.

Peers (Agno 3.1.10, langhost 0.11.1, Aegra 0.11.0, Langrove 0.3.0), measured on a machine like this one, in the same
scenario: 200 runs of 4 model calls of 50 ms and 3 tool calls, submitted 10 at a time, 30 executed at a time; Postgres,
Redis, model, client and service on the same two cores.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import psycopg

from app.db.migrate import upgrade
from app.devstack.processes import Process, Reaper
from app.devstack.stack import ROOT, Api, Stack
from tests.bench.admission import measure_admission
from tests.bench.budget import measure_budget
from tests.bench.client import Client, quantile
from tests.bench.crash import measure_crash
from tests.bench.people import measure_people
from tests.bench.prometheus import measure_prometheus
from tests.bench.scenario import SCENARIO, measure_scenario, measure_workers
from tests.bench.sealing import measure_sealing
from tests.bench.sweeper import measure_sweeper
from tests.bench.tracing import measure_tracing
from tests.bench.verifying import measure_verifying
from tests.bench.waiting import measure_waiting

SLOTS = 30
FULL = 100_000
PARTS = [
    "start",
    "idle",
    "admission",
    "scenario",
    "workers",
    "tracing",
    "prometheus",
    "waiting",
    "full",
    "sweeper",
    "people",
    "sealing",
    "verifying",
    "crash",
    "budget",
]
FORBIDDEN = ("openai", "langfuse", "opentelemetry")


class Table:
    """Rows: what, figure, goal, peers."""

    def __init__(self) -> None:
        print(f"{'':54} {'measured':>14}  {'goal':>10}  peers")

    def row(self, what: str, figure: str, goal: str = "", peers: str = "") -> None:
        print(f"{what:54} {figure:>14}  {goal:>10}  {peers}", flush=True)

    def rows(self, rows: Iterable[tuple[str, ...]]) -> None:
        for row in rows:
            self.row(*row)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="times the throughput scenario is run; the median counts")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part of it")
    options = parser.parse_args()
    parts = options.only or PARTS
    table = Table()
    with a_stack() as (stack, reaper):
        key = make_key(stack.env)
        if "start" in parts:
            measure_start(table, stack)
        if "idle" in parts:
            asyncio.run(measure_idle(table, stack, key))
        if "admission" in parts:
            table.rows(asyncio.run(measure_admission(stack, reaper)))
        in_rounds = {"scenario": measure_scenario, "workers": measure_workers}
        for part in [part for part in parts if part in in_rounds]:
            table.rows(asyncio.run(in_rounds[part](stack, key, options.rounds)))
        if "tracing" in parts:
            table.rows(asyncio.run(measure_tracing(stack, options.rounds)))
        if "prometheus" in parts:
            table.rows(asyncio.run(measure_prometheus(stack, key, reaper)))
        if "waiting" in parts:
            table.rows(asyncio.run(measure_waiting(stack, key)))
        if "full" in parts:
            asyncio.run(measure_full_table(table, stack, reaper))
        if "sweeper" in parts:
            table.rows(measure_sweeper(stack))
        if "people" in parts:
            table.rows(asyncio.run(measure_people(stack, key)))
        on_the_database = {"sealing": measure_sealing, "verifying": measure_verifying, "budget": measure_budget}
        for part in [part for part in parts if part in on_the_database]:
            table.rows(on_the_database[part](stack))
        if "crash" in parts:
            table.rows(asyncio.run(measure_crash(stack, key)))


@contextmanager
def a_stack() -> Iterator[tuple[Stack, Reaper]]:
    """A durable stack: every commit reaches the disk, as in production."""
    home = ROOT / ".dev"
    home.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as directory, Reaper() as reaper:
        env = {**os.environ, "AGENTS": "tests.agents", "WORKER_CONCURRENCY": str(SLOTS), "LOG_LEVEL": "warning"}
        env.pop("OPENAI_API_KEY", None)
        stack = Stack(Path(directory), reaper=reaper, env=env)
        try:
            stack.start()
            yield stack, reaper
        finally:
            stack.stop()


def make_key(env: dict[str, str]) -> str:
    command = [sys.executable, "-m", "app", "keys", "create", "--tenant", "bench", "--name", "bench"]
    command += ["--rate", "10000", "--burst", "100000", "--max-in-flight", "1000000"]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()[-1]


def measure_start(table: Table, stack: Stack) -> None:
    loaded = f"import sys, app.main; print(*[name for name in {FORBIDDEN} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True, text=True).stdout.strip()
    table.row("SDKs that `import app.main` loads", found or "none", "none")

    took = []
    for _ in range(5):
        stack.api.stop()
        began = time.perf_counter()
        stack.api.spawn()
        while not answers(f"{stack.api.address}/health/live"):
            time.sleep(0.005)
        took.append(time.perf_counter() - began)
    stack.api.wait_ready()
    table.row("API: start to first 200, s", f"{statistics.median(took):.2f}", "≤ 1.5")
    table.row("API: resident memory, MB", f"{resident(stack.api):.0f}", "≤ 90", "162 to 212 (whole service)")
    table.row("worker: resident memory, MB", f"{resident(stack.worker):.0f}")


def answers(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(address, timeout=1) as response:
        return bool(response.status == 200)
    return False


async def measure_idle(table: Table, stack: Stack, key: str) -> None:
    async with Client(stack.api.address, key) as client:
        for number in range(220):
            if number == 20:  # what comes before warms caches and connections
                client.took.clear()
                waits = []
            run = await client.submit("bench", "bench:1:0.001")
            await client.wait(run["id"])
            await client.get(run["id"])
            if number >= 20:
                waits.append(await client.until_first_call(run))
    table.row("idle: accept p50 / p95, ms", pair(client.took["accept"], 0.5, 0.95))
    table.row("idle: poll p50, ms", f"{quantile(client.took['poll'], 0.5):.1f}", "≤ 5")
    table.row("idle: accept to first model call p50 / p99, ms", pair(waits, 0.5, 0.99), "≤ 15 / 60")


async def measure_full_table(table: Table, stack: Stack, reaper: Reaper) -> None:
    """The same requests, in turns, to an API over an empty table and to one over a full one."""
    addresses = {}
    apis: list[Api] = []
    try:
        for name in ("empty", "full"):
            owner_url = stack.postgres.create_database(f"bench_{name}")
            upgrade(owner_url)
            url = stack.postgres.service_url(f"bench_{name}")
            env = {**stack.env, "DATABASE_URL": url, "REDIS_URL": stack.valkey.url(1 if name == "empty" else 2)}
            if name == "full":
                fill(owner_url)
            api = Api(name, log=stack.directory / f"{name}.log", reaper=reaper)
            api.env = env | api.own_env
            apis.append(api)
            api.start()
            addresses[name] = (api.address, make_key(env))
        async with Client(*addresses["empty"]) as empty, Client(*addresses["full"]) as full:
            for number in range(330):
                if number == 30:
                    empty.took.clear()
                    full.took.clear()
                for client in (empty, full) if number % 2 else (full, empty):
                    run = await client.submit("bench", SCENARIO)
                    await client.get(run["id"])
                    await client.first_page()
    finally:
        for api in apis:
            api.stop()
    for kind, what in (("accept", "POST"), ("poll", "GET"), ("list", "first page")):
        before, after = quantile(empty.took[kind], 0.5), quantile(full.took[kind], 0.5)
        table.row(
            f"{FULL} finished runs: {what} p50, ms",
            f"{before:.1f} → {after:.1f}",
            "≤ + 20 %",
            f"{after / before - 1:+.0%}",
        )


def fill(database_url: str) -> None:
    """Finished runs, as if they had come in over the past weeks: older than everything that follows."""
    statement = """
        INSERT INTO runs (id, tenant, api_key_id, request_id, agent, agent_version, input, metadata, limits, priority,
                          request_hash, status, stop_reason, output, ended_at, started_at, model_calls, attempt)
        SELECT (lpad(to_hex(1700000000000 + number), 12, '0') || '70008' || lpad(to_hex(number), 15, '0'))::uuid,
               'bench', 'k', 'r', 'bench', '1', to_jsonb(repeat('x', 200)), '{}', '{"max_steps": 10}', 0,
               '\\x00', 'succeeded', 'final_answer', to_jsonb(repeat('y', 400)), now(), now(), 4, 1
        FROM generate_series(1, %s) AS number
    """
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(statement, [FULL])
        connection.execute("VACUUM ANALYZE runs")


def pair(values: list[float], first: float, second: float) -> str:
    return f"{quantile(values, first):.1f} / {quantile(values, second):.1f}"


def resident(process: Process) -> float:
    """Megabytes."""
    return float(psutil.Process(process.pid).memory_info().rss) / 1e6


main()
