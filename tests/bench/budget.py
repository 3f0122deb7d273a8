"""What a tenant's budget costs: the check before a model call, and what settling adds to the record of its reply."""

import asyncio
import time
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import count
from pathlib import Path
from statistics import median

import uvloop
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.db import budgets, leases, runs
from app.db.budgets import Reservation
from app.db.engine import make_engine, transactional
from app.db.migrate import admit, upgrade
from app.devstack.servers import SERVICE_USER
from app.devstack.stack import Stack
from app.domain.run import Claim, RunUsage
from app.domain.step import ModelStep, Usage
from tests.bench.sealing import EVENT
from tests.db.test_transitions import claim, new_run
from tests.waiting import AMPLE

CALLS = 1_000
"""Of each kind."""
TOGETHER = 50
"""Runs of one tenant that make calls at the same time."""
CONNECTIONS = 10
"""As many as a worker has for its runs."""
SECONDS = 5.0
MOST, COST = Decimal("0.01"), Decimal("0.001")
WITH, WITHOUT = "with", "without"
"""The tenants: one of them has a budget."""
UNTRIGGERED = "untriggered"
"""A tenant without one, while nothing settles: what a record cost before there were budgets."""

Row = tuple[str, str, str]


def measure_budget(stack: Stack) -> list[Row]:
    """Rows: what, figure, goal."""
    name = "bench_budget"
    owner_url = stack.postgres.create_database(name)
    upgrade(owner_url)
    admit(owner_url, SERVICE_USER)
    return uvloop.run(_measure(stack.postgres.service_url(name), owner_url))


async def _measure(database_url: str, owner_url: str) -> list[Row]:
    engine = make_engine(database_url, pool_size=CONNECTIONS, application_name="bench", pool_timeout_s=60)
    owner = make_engine(owner_url, pool_size=1, application_name="bench owner")
    try:
        async with transactional(engine).begin() as db:
            await budgets.set_daily(db, WITH, Decimal(999_999))
        return [*await _alone(engine, owner), *await _together(engine)]
    finally:
        await engine.dispose()
        await owner.dispose()


@dataclass(slots=True)
class Calls:
    """Model calls of a kind: how long the statements took, and the CPU of this process and of Postgres' (ms)."""

    db: AsyncConnection
    backend: int
    """The process of Postgres that answers."""
    held: Claim
    reserves: list[float] = field(default_factory=list)
    records: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    async def make(self, seq: int) -> None:
        """One call; where nothing settles, nothing is reserved either."""
        began, cpu = time.perf_counter(), self._cpu()
        if self.held.run.tenant != UNTRIGGERED:
            assert await budgets.reserve(self.db, self.held, MOST) is not Reservation.SPENT
        reserved = time.perf_counter()
        await _record(self.db, self.held, seq)
        self.reserves.append((reserved - began) * 1000)
        self.records.append((time.perf_counter() - reserved) * 1000)
        self.cpu.append((self._cpu() - cpu) * 1000)

    def _cpu(self) -> float:
        on_cpu, *_ = Path(f"/proc/{self.backend}/schedstat").read_text().split()
        return time.process_time() + int(on_cpu) / 1e9


async def _alone(engine: AsyncEngine, owner: AsyncEngine) -> list[Row]:
    """One call at a time, the kinds in turns, so that all meet the same disk."""
    async with engine.connect() as db, owner.connect() as without_triggers:
        await without_triggers.execute(text("SET session_replication_role = 'replica'"))
        kinds = {
            tenant: Calls(connection, await _backend(connection), await _claimed(db, tenant))
            for tenant, connection in ((WITH, db), (WITHOUT, db), (UNTRIGGERED, without_triggers))
        }
        for seq in range(CALLS):
            for calls in kinds.values():
                await calls.make(seq)
    ours, others, before = kinds[WITH], kinds[WITHOUT], kinds[UNTRIGGERED]
    reserving, settling = median(ours.reserves), _added(ours.records, others.records)
    return [
        ("budget: reserving for a model call: p50, ms", f"{reserving:.2f}", ""),
        ("… what settling adds to the record of its reply, ms", f"{settling:+.2f}", ""),
        ("… both together, ms a model call", f"{reserving + settling:.2f}", "≤ 1"),
        ("… CPU of client and Postgres, ms a model call", f"{_added(ours.cpu, before.cpu):+.2f}", ""),
        ("… without a budget: asking whether there is one, ms", f"{median(others.reserves):.2f}", "≤ 1"),
        ("… without a budget: what the trigger adds, ms", f"{_added(others.records, before.records):+.2f}", ""),
        ("… without a budget: CPU, ms a model call", f"{_added(others.cpu, before.cpu):+.2f}", ""),
        ("… a record's commit itself, ms", f"{median(before.records):.2f}", ""),
    ]


def _added(more: list[float], less: list[float]) -> float:
    """The median difference of what was measured in turns."""
    return median(one - other for one, other in zip(more, less, strict=True))


async def _backend(db: AsyncConnection) -> int:
    return int((await db.execute(text("SELECT pg_backend_pid()"))).scalar_one())


async def _record(db: AsyncConnection, held: Claim, seq: int) -> None:
    step = ModelStep(
        seq=seq, attempt=1, model="a-model", content="x" * 200, finish_reason="stop", usage=Usage(), cost_usd=COST
    )
    used = RunUsage(model_calls=1, input_tokens=500, output_tokens=50, cost_usd=COST)
    await leases.record(db, held, [step], lease_seconds=60, audit=[EVENT], actor="worker:bench", used=used)


async def _together(engine: AsyncEngine) -> list[Row]:
    """Reserve and record as fast as it goes, all on one tenant's row."""
    rates: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    async with engine.connect() as db:
        held = {tenant: [await _claimed(db, tenant) for _ in range(TOGETHER)] for tenant in rates}
    for _ in range(3):
        for tenant, measured in rates.items():
            measured.append(await _rate(engine, held[tenant]))
    hot, free = median(rates[WITH]), median(rates[WITHOUT])
    return [
        (f"budget: model calls of {TOGETHER} runs of one tenant, 1/s", f"{hot:.0f}", ""),
        ("… of a tenant without a budget, 1/s", f"{free:.0f}", ""),
    ]


async def _rate(engine: AsyncEngine, held: list[Claim]) -> float:
    """Calls per second."""
    calls = 0
    seqs = count(round(time.time() * 10) % 10**9)
    until = time.perf_counter() + SECONDS

    async def keep_calling(one: Claim) -> None:
        nonlocal calls
        while time.perf_counter() < until:
            async with engine.connect() as db:
                assert await budgets.reserve(db, one, MOST) is not Reservation.SPENT
            async with engine.connect() as db:
                await _record(db, one, next(seqs))
            calls += 1

    await asyncio.gather(*(keep_calling(one) for one in held))
    return calls / SECONDS


async def _claimed(db: AsyncConnection, tenant: str) -> Claim:
    run = await runs.accept(db, replace(new_run(), tenant=tenant), AMPLE)
    assert run is not None
    return await claim(db, run.id, lease_seconds=3600)
