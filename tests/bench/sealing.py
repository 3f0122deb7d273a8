"""What the audit costs: sealing 10,000 changed chains, appending meanwhile, and the events of a step's commit."""

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Sequence
from decimal import Decimal
from itertools import count, cycle
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.anchor import FileAnchor
from app.audit.proof import leaf_hash, sign_checkpoint
from app.background import in_background
from app.db import leases, seals
from app.db.audit import audit_parameters
from app.db.engine import make_engine
from app.db.fetch import fetch
from app.db.migrate import admit, upgrade
from app.db.steps import step_parameters
from app.devstack.servers import SERVICE_USER
from app.devstack.stack import Stack
from app.domain.audit import AuditEntry, AuditKind
from app.domain.step import ModelStep, Usage
from tests.bench.client import quantile
from tests.bench.sweeper import a_ticker
from worker.sealer import MARKS, Sealer

HEADS = 10_000
ROUNDS = 3
COMMITS = 800
"""Of each kind, at each concurrency."""
EVENT = AuditEntry(
    AuditKind.MODEL_REPLIED,
    {"step": 3, "model": "a-model", "tools": ["find_order"], "finish_reason": "tool_calls", "agent_version": "a" * 12},
    {"content": None, "tool_calls": [{"tool": "find_order", "arguments": json.dumps({"order": "A-1001"})}]},
)

Row = tuple[str, str, str]


def measure_sealing(stack: Stack) -> list[Row]:
    """Rows: what, figure, goal."""
    name = "bench_sealing"
    owner_url = stack.postgres.create_database(name)
    upgrade(owner_url)
    admit(owner_url, SERVICE_USER)
    return uvloop.run(_measure(stack.postgres.service_url(name)))


async def _measure(database_url: str) -> list[Row]:
    engine = make_engine(database_url, pool_size=24, application_name="bench")
    try:
        return [*await _sealing(engine), *await _commits(engine, running_runs(database_url, 16))]
    finally:
        await engine.dispose()


async def _sealing(engine: AsyncEngine) -> list[Row]:
    key = Ed25519PrivateKey.generate()
    rounds, marks, lates = list[float](), list[float](), list[float]()
    waits, usual = list[float](), list[float]()
    run_ids = [uuid4() for _ in range(HEADS)]
    with tempfile.TemporaryDirectory() as directory:
        sealer = Sealer(engine, key, FileAnchor(Path(directory) / "anchor.jsonl"))
        for _ in range(ROUNDS):
            await _append_to(engine, run_ids)
            usual += await _appends_during(engine, run_ids, asyncio.sleep(1))
            await _append_to(engine, run_ids)
            async with a_ticker() as late:
                began = time.perf_counter()
                await sealer.seal()
                rounds.append(time.perf_counter() - began)
                lates.append(max(late))
            await _append_to(engine, run_ids)
            waits += await _appends_during(engine, run_ids, sealer.seal())
            await _append_to(engine, run_ids)
            marks.append(await _mark(engine, key))
    return [
        (f"sealing {HEADS} changed heads, s", f"{statistics.median(rounds):.2f}", "≤ 2"),
        (f"… it holds the locks of {MARKS} heads for, ms", f"{statistics.median(marks):.0f} / {max(marks):.0f}", ""),
        ("… it blocks the loop for, ms", f"{max(lates):.0f}", "≤ 50"),
        ("… an append meanwhile: p50 / max, ms", f"{quantile(waits, 0.5):.1f} / {max(waits):.0f}", ""),
        ("… an append otherwise: p50 / max, ms", f"{quantile(usual, 0.5):.1f} / {max(usual):.0f}", ""),
    ]


async def _append_to(engine: AsyncEngine, run_ids: Sequence[UUID]) -> None:
    statement = text("""
        SELECT append_audit(id, 'bench', 'worker:bench', CAST(:events AS jsonb))
        FROM unnest(CAST(:ids AS uuid[])) AS run (id)
    """)
    async with engine.connect() as connection:
        await fetch(connection, statement, {"ids": list(run_ids), "events": audit_parameters("", EVENT)["events"]})


async def _appends_during(engine: AsyncEngine, run_ids: Sequence[UUID], work: Awaitable[None]) -> list[float]:
    """How long each of the appends takes (milliseconds) that others make, run after run, while this is done."""
    took: list[float] = []
    turns = cycle(run_ids[:: HEADS // 1000])

    async def append() -> None:
        for run_id in turns:
            began = time.perf_counter()
            await _append_to(engine, [run_id])
            took.append((time.perf_counter() - began) * 1000)

    async with in_background(append()), in_background(append()), in_background(append()), in_background(append()):
        await work
    return took


async def _mark(engine: AsyncEngine, key: Ed25519PrivateKey) -> float:
    """The longest of the statements (milliseconds) that lock heads."""
    took = []
    async with engine.connect() as connection:
        newest = await seals.newest(connection)
        heads = await seals.unsealed(connection, limit=HEADS)
        hashes = [leaf_hash(leaf) for leaf in heads.encoded]
        checkpoint = sign_checkpoint(hashes, previous=newest.checkpoint if newest else None, at=heads.at, key=key)
        await seals.seal(connection, seals.seal_parameters(checkpoint, heads))
        for begin in range(0, HEADS, MARKS):
            began = time.perf_counter()
            await seals.mark(connection, checkpoint.number, heads.encoded[begin : begin + MARKS])
            took.append((time.perf_counter() - began) * 1000)
    return max(took)


async def _commits(engine: AsyncEngine, held: Sequence[tuple[UUID, UUID]]) -> list[Row]:
    with_audit = leases._RECORD
    without = text(with_audit.text.replace("append_audit(id, tenant, :actor, CAST(:events AS jsonb))", "id"))
    assert without.text != with_audit.text
    rows = list[Row]()
    for concurrency in (1, 16):
        took: dict[TextClause, list[float]] = {with_audit: [], without: []}
        await asyncio.gather(*(_record(engine, one, COMMITS // concurrency, took) for one in held[:concurrency]))
        audited, bare = (statistics.median(values) for values in took.values())
        rows += [
            (f"a step's commit, {concurrency} at a time: p50, ms", f"{audited:.2f}", ""),
            ("… the audit's part of it, ms", f"{audited - bare:.2f}", "≤ 1"),
        ]
    return rows


async def _record(
    engine: AsyncEngine, held: tuple[UUID, UUID], commits: int, took: dict[TextClause, list[float]]
) -> None:
    """With and without the audit in turns, so that both meet the same disk."""
    used = {
        "model_calls": 1,
        "input_tokens": 500,
        "cached_tokens": 0,
        "output_tokens": 50,
        "cost_usd": Decimal("0.001"),
    }
    numbers = count()
    for number in range(commits + 20):
        for statement, values in took.items():
            step = ModelStep(
                seq=next(numbers), attempt=1, model="a-model", content="x" * 200, finish_reason="stop", usage=Usage()
            )
            parameters = {"id": held[0], "token": held[1], "lease_seconds": 60, **used}
            began = time.perf_counter()
            async with engine.connect() as connection:
                events = audit_parameters("worker:bench", EVENT)
                await fetch(connection, statement, {**parameters, "steps": step_parameters([step]), **events})
            if number >= 20:
                values.append((time.perf_counter() - began) * 1000)


def running_runs(database_url: str, how_many: int) -> list[tuple[UUID, UUID]]:
    """Their ids and the tokens of their leases."""
    statement = """
        INSERT INTO runs (id, tenant, api_key_id, request_id, agent, agent_version, input, metadata, limits, priority,
                          request_hash, status, lease_token, lease_until, running_since, attempt)
        VALUES (%s, 'bench', 'k', 'r', 'bench', '1', '"x"', '{}', '{}', 0, '', 'running', %s, now(), now(), 1)
    """
    held = [(uuid4(), uuid4()) for _ in range(how_many)]
    with psycopg.connect(database_url, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.executemany(statement, held)
    return held
