"""A real Prometheus scrapes the API and a worker while runs are executed, and is asked all that the panels ask."""

import asyncio
import time
from collections.abc import Callable

import aiohttp

from app.devstack.access import make_key
from app.devstack.ports import LOOPBACK
from app.devstack.processes import Reaper
from app.devstack.stack import Stack
from app.domain.principal import Scope
from tests.bench.client import Client, Json, in_parallel, quantile
from tests.bench.scenario import RUNS, run_scenario
from tests.otlp import receiver
from tests.prometheus import API_JOB, WORKER_JOB, Prometheus, Query, queries

AGENT = "doorkeeper"
"""Chosen on the board of one agent: it calls a tool, and asks a person each time."""
ASKED = 10
SETTLE_SECONDS = 20.0
SCRAPED_SECONDS = 1.2
"""Prometheus looks every second."""

Row = tuple[str, str, str, str]


async def measure_prometheus(stack: Stack, key: str, reaper: Reaper) -> list[Row]:
    """Rows: what, figure, goal, which panels were silent."""
    directory = stack.directory / "prometheus"
    directory.mkdir()
    with receiver("collector") as back_end:
        worker = stack.another_worker("traced", **back_end.settings)
        targets = {API_JOB: [f"{LOOPBACK}:{stack.api.port}"], WORKER_JOB: [f"{LOOPBACK}:{worker.port}"]}
        prometheus = Prometheus(directory, targets=targets, reaper=reaper)
        stack.worker.stop()
        try:
            worker.start()
            prometheus.start()
            await _until(lambda: len(prometheus.ask("up == 1")) == len(targets))
            began = time.monotonic()
            await _work(stack, key)
            await _until(lambda: _ended(prometheus) >= RUNS + ASKED)
            return _ask_all(prometheus, round(time.monotonic() - began) + 5)
        finally:
            prometheus.stop()
            worker.stop()
            stack.worker.start()


async def _work(stack: Stack, key: str) -> None:
    scopes = (Scope.REVIEWS_READ, Scope.REVIEWS_DECIDE)
    reviewer = await asyncio.to_thread(make_key, stack.database_url, tenant="bench", name="watcher", scopes=scopes)
    async with Client(stack.api.address, key) as client:
        asked = await in_parallel(ASKED, [lambda: client.submit(AGENT, "bench:3:0.02")] * ASKED)
        deciding = asyncio.create_task(_decide(stack, reviewer, {run["id"] for run in asked}))
        await run_scenario(client, RUNS)
        await asyncio.gather(*(client.wait(run["id"]) for run in asked))
        await deciding


async def _decide(stack: Stack, key: str, run_ids: set[str]) -> None:
    """Approve the two calls of each run, one after the other: the second one is what a rate shows."""
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(stack.api.address, headers=headers) as session:
        decided = 0
        while decided < 2 * ASKED:
            await asyncio.sleep(SCRAPED_SECONDS)
            reviews = [review for review in await _pending(session) if review["run_id"] in run_ids]
            for review in reviews:
                body = {"decision": "approve", "args_hash": review["args_hash"]}
                async with session.post(f"/v1/reviews/{review['id']}/decision", json=body) as answer:
                    answer.raise_for_status()
            decided += len(reviews)


async def _pending(session: aiohttp.ClientSession) -> list[Json]:
    async with session.get("/v1/reviews", params={"status": "pending", "agent": AGENT, "limit": "100"}) as answer:
        answer.raise_for_status()
        found: list[Json] = (await answer.json())["data"]
        return found


def _ended(prometheus: Prometheus) -> float:
    return sum(float(one["value"][1]) for one in prometheus.ask("sum(agent_service_runs_ended_total)"))


async def _until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SETTLE_SECONDS
    while not await asyncio.to_thread(condition):
        if time.monotonic() > until:
            raise RuntimeError(f"Prometheus has not seen it within {SETTLE_SECONDS:g} s")
        await asyncio.sleep(0.2)


def _ask_all(prometheus: Prometheus, seconds: int) -> list[Row]:
    panels: dict[tuple[str, str], bool] = {}
    took: list[float] = []
    for query in queries():
        began = time.perf_counter()
        answers = bool(prometheus.ask(_filled(query, seconds)))
        took.append((time.perf_counter() - began) * 1000)
        panel = (query.board, query.panel)
        panels[panel] = answers and panels.get(panel, True)
    rows: list[Row] = []
    for board in sorted({board for board, _ in panels}):
        answered = [answers for (of, _), answers in panels.items() if of == board]
        silent = [panel for (of, panel), answers in panels.items() if of == board and not answers]
        figure = f"{sum(answered)} of {len(answered)}"
        rows.append((f"prometheus: panels of {board} with data", figure, "all", ", ".join(silent)))
    rows.append(("prometheus: a query p50 / max, ms", f"{quantile(took, 0.5):.1f} / {max(took):.1f}", "", ""))
    return rows


def _filled(query: Query, seconds: int) -> str:
    return query.filled(agent=AGENT, interval=f"{seconds}s", span=f"{seconds}s")
