"""Reviews: asked by `leases.suspend`, listed, read and decided here, each exactly once. How they expire: `expiry`.

A decision is one transaction: the run's row is locked first, so that decisions, expiry and cancel of a run come one
after the other; then the review is compared and set; then the run goes on or ends.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import runs
from app.db.audit import audit_parameters
from app.db.fetch import Row, fetch, fetch_one
from app.db.runs import LOCK_IDLE_SECONDS
from app.domain.agent import Limits, OnExpiry
from app.domain.audit import AuditEntry, AuditKind
from app.domain.ids import first_id_at
from app.domain.review import Decision, Review, ReviewKind, ReviewQueue, ReviewStatus
from app.domain.run import Priority, Run, RunStatus, StopReason

COLUMNS = """
    id, tenant, run_id, agent, kind, seq, tool, arguments, args_hash, why, stop_reason, queue, barred, on_expiry,
    expires_s, status, decision, edited, reason, response, decided_by, created_at, decided_at, expires_at
"""


def _review_of(row: Row) -> Review:
    return Review(
        **{
            **{name: row[name] for name in Review.__dataclass_fields__},
            "kind": ReviewKind(row["kind"]),
            "status": ReviewStatus(row["status"]),
            "stop_reason": StopReason(row["stop_reason"]) if row["stop_reason"] else None,
            "queue": ReviewQueue(row["queue"]),
            "barred": tuple(row["barred"]),
            "on_expiry": OnExpiry(row["on_expiry"]),
            "decision": Decision(row["decision"]) if row["decision"] else None,
        }
    )


_GET = text(f"SELECT {COLUMNS} FROM reviews WHERE id = :id AND tenant = :tenant")  # noqa: S608 - constant columns


async def get(connection: AsyncConnection, review_id: UUID, tenant: str) -> Review | None:
    """The review, or None where it is missing or another tenant's."""
    row = await fetch_one(connection, _GET, {"id": review_id, "tenant": tenant})
    return _review_of(row) if row else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewFilter:
    """Which reviews to list; None means all. Ages are in seconds, by Postgres' clock."""

    status: ReviewStatus | None = None
    agent: str | None = None
    kind: ReviewKind | None = None
    queue: ReviewQueue | None = None
    older_than: float | None = None
    newer_than: float | None = None
    before: UUID | None = None
    """Only reviews asked before this one: where the previous page ended."""


# An index gives the newest first, and an id says when it was made: to the millisecond, by the clock of the worker that
# asked. So an age also bounds the ids, with room for clocks that differ, and nobody reads a million rows to drop them.
_CLOCKS_DIFFER_SECONDS = 600.0
_CONDITIONS = {
    "status": "status = :status",
    "agent": "agent = :agent",
    "kind": "kind = :kind",
    "queue": "queue = :queue",
    "older_than": "created_at < now() - make_interval(secs => :older_than) AND id < :end",
    "newer_than": "created_at > now() - make_interval(secs => :newer_than) AND id >= :begin",
    "before": "id < :before",
}


@cache
def _list_statement(filters: tuple[str, ...]) -> TextClause:
    clauses = " AND ".join(["tenant = :tenant", *(_CONDITIONS[name] for name in filters)])
    return text(f"SELECT {COLUMNS} FROM reviews WHERE {clauses} ORDER BY id DESC LIMIT :limit")  # noqa: S608


async def list_newest(connection: AsyncConnection, tenant: str, where: ReviewFilter, *, limit: int) -> Sequence[Review]:
    """Newest first."""
    filters = {name: value for name in _CONDITIONS if (value := getattr(where, name)) is not None}
    bounds = {
        "end": first_id_at(time.time() - (where.older_than or 0) + _CLOCKS_DIFFER_SECONDS),
        "begin": first_id_at(time.time() - (where.newer_than or 0) - _CLOCKS_DIFFER_SECONDS),
    }
    rows = await fetch(
        connection, _list_statement(tuple(filters)), {**filters, **bounds, "tenant": tenant, "limit": limit}
    )
    return [_review_of(row) for row in rows]


_OF_RUN = text(f"SELECT {COLUMNS} FROM reviews WHERE run_id = :run_id ORDER BY id")  # noqa: S608


async def of_run(connection: AsyncConnection, run_id: UUID) -> Sequence[Review]:
    """Every review of a run, oldest first. Whose run it is, the caller has checked."""
    return [_review_of(row) for row in await fetch(connection, _OF_RUN, {"run_id": run_id})]


_COUNT_OPEN = text("SELECT count(*) FROM reviews WHERE run_id = :run_id AND status = 'pending' AND id <> :besides")


async def count_open(connection: AsyncConnection, run_id: UUID, *, besides: UUID) -> int:
    """How many other reviews of the run wait for a decision."""
    return int((await connection.execute(_COUNT_OPEN, {"run_id": run_id, "besides": besides})).scalar_one())


_LOCK_RUN = text(f"""
    SELECT {runs.COLUMNS}, set_config('idle_in_transaction_session_timeout', CAST(:idle_ms AS text), true)
    FROM runs WHERE id = :run_id FOR UPDATE
""")  # noqa: S608


async def lock_run(connection: AsyncConnection, run_id: UUID) -> Run:
    """Hold the run's row until the transaction ends, so that decisions, expiry and cancel come one after the other."""
    row = await fetch_one(connection, _LOCK_RUN, {"run_id": run_id, "idle_ms": int(LOCK_IDLE_SECONDS * 1000)})
    assert row is not None
    return runs.run_of(row)


_DECIDE = text(f"""
    WITH decided AS (
        UPDATE reviews SET status = 'decided', decision = :decision, edited = CAST(:edited AS jsonb), reason = :reason,
                           response = :response, decided_by = :actor, decided_at = now()
        WHERE id = :id AND tenant = :tenant AND status = 'pending' AND queue = :queue AND expires_at > now()
          AND args_hash = :args_hash
        RETURNING {COLUMNS}
    )
    SELECT decided.*, append_audit(run_id, tenant, :actor, CAST(:events AS jsonb)) FROM decided
""")  # noqa: S608


async def decide(
    connection: AsyncConnection,
    review: Review,
    decision: Decision,
    *,
    actor: str,
    args_hash: str,
    edited: JsonValue = None,
    reason: str | None = None,
    response: str | None = None,
) -> Review | None:
    """pending → decided. None: somebody else was first, it expired, or the arguments are not those that were seen."""
    data: dict[str, JsonValue] = {"id": str(review.id), "decision": decision}
    if review.kind is ReviewKind.LIMIT and decision in (Decision.APPROVE, Decision.EDIT):
        data["limits"] = review.arguments if edited is None else edited
    said: dict[str, JsonValue] = {"args_hash": args_hash, "reason": reason, "response": response, "arguments": edited}
    entry = AuditEntry(AuditKind.REVIEW_DECIDED, data, said)
    row = await fetch_one(
        connection,
        _DECIDE,
        {
            "id": review.id,
            "tenant": review.tenant,
            "queue": review.queue,
            "decision": decision,
            "edited": None if edited is None else json.dumps(edited),
            "reason": reason,
            "response": response,
            "args_hash": args_hash,
            **audit_parameters(actor, entry),
        },
    )
    return _review_of(row) if row else None


_RESUME = text("""
    WITH resumed AS (
        UPDATE runs SET status = 'queued', queued_at = now(), needs_enqueue = true
        WHERE id = :run_id AND status = 'waiting'
          AND NOT EXISTS (SELECT FROM reviews WHERE run_id = :run_id AND reviews.status = 'pending')
        RETURNING id, tenant, priority
    )
    SELECT priority, append_audit(id, tenant, :actor, CAST(:events AS jsonb)) FROM resumed
""")


async def resume_run(connection: AsyncConnection, run_id: UUID, *, actor: str) -> Priority | None:
    """waiting → queued, once nothing is left to decide: its priority, for the queue. None: it still waits, or ended.

    Marked for the sweeper, should this process end before it has told Redis.
    """
    entry = AuditEntry(AuditKind.RUN_REQUEUED, {"why": "decided"})
    row = await fetch_one(connection, _RESUME, {"run_id": run_id, **audit_parameters(actor, entry)})
    return Priority(row["priority"]) if row else None


_RAISE = text("""
    UPDATE runs SET limits = CAST(:limits AS jsonb) WHERE id = :run_id AND status = 'waiting' RETURNING id
""")


async def raise_limit(connection: AsyncConnection, run_id: UUID, limits: Limits) -> None:
    """The bounds of a waiting run, with the one that a person has raised. Which one, the audit has by its review."""
    await fetch(connection, _RAISE, {"run_id": run_id, "limits": limits.model_dump_json()})


_END_WAITING = text("""
    WITH ended AS (
        UPDATE runs SET status = :status, stop_reason = :stop_reason, output = CAST(:output AS jsonb), error = :error,
                        ended_at = now(), unreported = true
        WHERE id = :run_id AND status = 'waiting'
        RETURNING id, tenant
    ), voided AS (
        UPDATE reviews SET status = 'void' FROM ended WHERE run_id = ended.id AND reviews.status = 'pending'
    )
    SELECT append_audit(id, tenant, :actor, CAST(:events AS jsonb)) FROM ended
""")


async def end_run(
    connection: AsyncConnection,
    run_id: UUID,
    stop_reason: StopReason,
    *,
    actor: str,
    output: JsonValue = None,
    error: str | None = None,
) -> bool:
    """waiting → the terminal state that goes with the reason: a reviewer ended the run. False: it was not waiting."""
    left: dict[str, JsonValue] = {"output": output, "error": error}
    kind = AuditKind.RUN_SUCCEEDED if stop_reason.status is RunStatus.SUCCEEDED else AuditKind.RUN_FAILED
    parameters = {
        "run_id": run_id,
        "status": stop_reason.status,
        "stop_reason": stop_reason,
        "output": None if output is None else json.dumps(output),
        "error": error,
        **audit_parameters(actor, AuditEntry(kind, {"stop_reason": stop_reason}, left)),
    }
    return bool(await fetch(connection, _END_WAITING, parameters))


_BEGAN = text("""
    SELECT actor FROM audit_events
    WHERE run_id = :run_id AND tenant = :tenant AND kind = 'tool.intended' AND data ->> 'step' = CAST(:seq AS text)
    ORDER BY seq DESC LIMIT 1
""")


async def worker_that_began(connection: AsyncConnection, review: Review) -> str | None:
    """The worker that began the call that is in doubt: the last one whose intent was recorded."""
    parameters = {"run_id": review.run_id, "tenant": review.tenant, "seq": review.seq}
    row = await fetch_one(connection, _BEGAN, parameters)
    return row["actor"].removeprefix("worker:") if row else None
