"""Runs as their submitter sees them: accept, read, list, cancel. What a worker does to them is in `leases`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from uuid import UUID

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.audit import audit_parameters
from app.db.budgets import SPENT_TODAY
from app.db.fetch import Row, fetch, fetch_one
from app.domain.agent import Limits
from app.domain.audit import AuditEntry, AuditKind
from app.domain.run import NewRun, Priority, Run, RunStatus, RunTime, RunUsage, StopReason

PAGE_BYTES = 2_097_152
"""Of inputs and outputs on a page: it ends with the run that goes beyond. A hundred runs can have hundreds of MiB."""
LOCK_IDLE_SECONDS = 5.0
"""A process that holds a key or a run's row and does nothing for so long is frozen; Postgres takes it away."""

COLUMNS = """
    id, tenant, agent, agent_version, input, metadata, limits, priority, status, stop_reason, output, error,
    model_calls, input_tokens, cached_tokens, output_tokens, cost_usd, attempt, active_ms,
    queued_ms, human_ms, model_ms, tools_ms, created_at, queued_at, waiting_since, lost_since, running_since,
    started_at, ended_at, erased_at, request_id, traceparent, now() AS read_at
"""


def run_of(row: Row) -> Run:
    """A row that has `COLUMNS`, as a run."""
    return Run(
        id=row["id"],
        tenant=row["tenant"],
        agent=row["agent"],
        agent_version=row["agent_version"],
        input=row["input"],
        metadata=row["metadata"],
        limits=Limits.model_validate(row["limits"]),
        priority=Priority(row["priority"]),
        status=RunStatus(row["status"]),
        stop_reason=StopReason(row["stop_reason"]) if row["stop_reason"] else None,
        output=row["output"],
        error=row["error"],
        usage=RunUsage(
            model_calls=row["model_calls"],
            input_tokens=row["input_tokens"],
            cached_tokens=row["cached_tokens"],
            output_tokens=row["output_tokens"],
            cost_usd=row["cost_usd"],
        ),
        attempt=row["attempt"],
        time=RunTime(
            queued_ms=row["queued_ms"],
            human_ms=row["human_ms"],
            active_ms=row["active_ms"],
            model_ms=row["model_ms"],
            tools_ms=row["tools_ms"],
        ),
        created_at=row["created_at"],
        queued_at=row["queued_at"],
        waiting_since=row["waiting_since"],
        lost_since=row["lost_since"],
        running_since=row["running_since"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        erased_at=row["erased_at"],
        request_id=row["request_id"],
        traceparent=row["traceparent"],
        read_at=row["read_at"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What has to be left for a run to be accepted.

    `max_in_flight`: of the runs of the key's holder, so many may be queued or running, this one included, whichever of
    the holder's keys they were submitted with. `first_call_usd`: what the first model call may cost, at least; None:
    nobody knows, so a tenant with a budget may not ask for it.
    """

    max_in_flight: int
    first_call_usd: Decimal | None


_ACCEPT = text(f"""
    WITH in_flight AS MATERIALIZED (
        SELECT count(*) AS runs FROM (
            SELECT FROM runs
            WHERE status IN ('queued', 'running')
              AND api_key_id = ANY(CAST(:api_key_id AS text) || ARRAY(
                  SELECT other.id FROM api_keys AS own JOIN api_keys AS other USING (holder)
                  WHERE own.id = :api_key_id))
            LIMIT :max_in_flight
        ) AS of_the_holder
    ), accepted AS (
        INSERT INTO runs (id, tenant, api_key_id, request_id, agent, agent_version, input, metadata, limits, priority,
                          idempotency_key, request_hash, traceparent, status)
        SELECT :id, :tenant, :api_key_id, :request_id, :agent, :agent_version, CAST(:input AS jsonb),
               CAST(:metadata AS jsonb), CAST(:limits AS jsonb), :priority, :idempotency_key, :request_hash,
               :traceparent, 'queued'
        FROM in_flight
        WHERE in_flight.runs < :max_in_flight
          AND NOT EXISTS (
              SELECT FROM budgets
              WHERE tenant = :tenant AND ({SPENT_TODAY} + CAST(:first_call_usd AS numeric) <= daily_usd) IS NOT TRUE)
        ON CONFLICT (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING {COLUMNS}
    )
    SELECT accepted.*, append_audit(id, tenant, :actor, CAST(:events AS jsonb)) FROM accepted
""")  # noqa: S608 - the columns are a constant


async def accept(connection: AsyncConnection, new: NewRun, allowance: Allowance) -> Run | None:
    """Store a submission as a queued run. None: the tenant has used this idempotency key before, or there is no room.

    What others are adding at the same moment is not counted: `hold_key` makes them come one after the other.
    """
    entry = AuditEntry(
        AuditKind.RUN_ACCEPTED,
        {
            "agent": new.agent,
            "agent_version": new.agent_version,
            "limits": new.limits.model_dump(mode="json"),
            "request_id": new.request_id,
        },
        {"input": new.input, "metadata": dict(new.metadata)},
    )
    row = await fetch_one(
        connection,
        _ACCEPT,
        {
            "id": new.id,
            "tenant": new.tenant,
            "api_key_id": new.api_key_id,
            "request_id": new.request_id,
            "agent": new.agent,
            "agent_version": new.agent_version,
            "input": json.dumps(new.input),
            "metadata": json.dumps(new.metadata),
            "limits": new.limits.model_dump_json(),
            "priority": new.priority,
            "idempotency_key": new.idempotency_key,
            "request_hash": new.request_hash,
            "traceparent": new.traceparent,
            "max_in_flight": allowance.max_in_flight,
            "first_call_usd": allowance.first_call_usd,
            **audit_parameters(f"key:{new.api_key_id}", entry),
        },
    )
    return run_of(row) if row else None


_HOLD_KEY = text("""
    SELECT set_config('idle_in_transaction_session_timeout', CAST(:idle_ms AS text), true)
    FROM api_keys WHERE id = :id FOR NO KEY UPDATE
""")


async def hold_key(connection: AsyncConnection, holder: str) -> None:
    """Until the transaction ends, nobody else accepts a run of this holder who holds its first key, too."""
    await fetch(connection, _HOLD_KEY, {"id": holder, "idle_ms": int(LOCK_IDLE_SECONDS * 1000)})


_BY_IDEMPOTENCY_KEY = text(f"""
    SELECT {COLUMNS}, request_hash FROM runs WHERE tenant = :tenant AND idempotency_key = :idempotency_key
""")  # noqa: S608


async def find_by_idempotency_key(
    connection: AsyncConnection, tenant: str, idempotency_key: str
) -> tuple[Run, bytes] | None:
    """The run that was accepted under this key, and the hash of its request."""
    row = await fetch_one(connection, _BY_IDEMPOTENCY_KEY, {"tenant": tenant, "idempotency_key": idempotency_key})
    return (run_of(row), bytes(row["request_hash"])) if row else None


_NEEDS_ENQUEUE = text("UPDATE runs SET needs_enqueue = true WHERE id = ANY(:ids) AND status = 'queued'")


async def mark_needs_enqueue(connection: AsyncConnection, run_ids: Sequence[UUID]) -> None:
    """Redis did not take them: the sweeper will look for them first."""
    await connection.execute(_NEEDS_ENQUEUE, {"ids": list(run_ids)})


_GET = text(f"SELECT {COLUMNS} FROM runs WHERE id = :id AND tenant = :tenant")  # noqa: S608


async def get(connection: AsyncConnection, run_id: UUID, tenant: str) -> Run | None:
    """The run, or None where it is missing or another tenant's."""
    row = await fetch_one(connection, _GET, {"id": run_id, "tenant": tenant})
    return run_of(row) if row else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFilter:
    """Which runs to list; None means all."""

    status: RunStatus | None = None
    agent: str | None = None
    before: UUID | None = None
    """Only runs submitted before this one: where the previous page ended."""


_CONDITIONS = {"status": "status = :status", "agent": "agent = :agent", "before": "id < :before"}


@cache
def _list_statement(filters: tuple[str, ...]) -> TextClause:
    clauses = " AND ".join(["tenant = :tenant", *(_CONDITIONS[name] for name in filters)])
    return text(f"""
        SELECT * FROM (
            SELECT *, sum(size) OVER (ORDER BY id DESC) - size AS size_before, count(*) OVER () AS found FROM (
                SELECT {COLUMNS}, octet_length(input::text) + coalesce(octet_length(output::text), 0) AS size
                FROM runs WHERE {clauses} ORDER BY id DESC LIMIT :limit
            ) AS newest
        ) AS page
        WHERE size_before < :page_bytes ORDER BY id DESC
    """)  # noqa: S608


async def list_newest(
    connection: AsyncConnection, tenant: str, where: RunFilter, *, limit: int
) -> tuple[Sequence[Run], bool]:
    """Newest first; and whether there are more. Fewer than `limit` where they are large: see `PAGE_BYTES`.

    Each combination of filters is served from an index, so the table's size does not matter.
    """
    filters = {name: value for name in _CONDITIONS if (value := getattr(where, name)) is not None}
    statement = _list_statement(tuple(filters))
    rows = await fetch(
        connection, statement, {**filters, "tenant": tenant, "limit": limit + 1, "page_bytes": PAGE_BYTES}
    )
    page = rows[:limit]
    return [run_of(row) for row in page], bool(page) and page[0]["found"] > len(page)


_CANCEL = text(f"""
    WITH cancelled AS (
        UPDATE runs
        SET status = 'cancelled', stop_reason = 'cancelled', ended_at = now(), unreported = true,
            lease_token = NULL, lease_until = NULL, running_since = NULL, needs_enqueue = false,
            active_ms = active_ms + coalesce(extract(epoch FROM now() - running_since) * 1000, 0)
        WHERE id = :id AND tenant = :tenant AND status IN ('queued', 'running', 'waiting')
        RETURNING {COLUMNS}
    ), doubted AS (
        UPDATE steps SET state = 'in_doubt' FROM cancelled WHERE run_id = cancelled.id AND state = 'intended'
    ), voided AS (
        UPDATE reviews SET status = 'void' FROM cancelled WHERE run_id = cancelled.id AND reviews.status = 'pending'
    )
    SELECT cancelled.*, append_audit(id, tenant, :actor, CAST(:events AS jsonb)) FROM cancelled
""")  # noqa: S608

# What a worker wrote while the cancel waited for it to let go of the row, the cancel's own snapshot does not show.
_CANCEL_LATE = text("""
    WITH voided AS (
        UPDATE reviews SET status = 'void' WHERE run_id = :id AND status = 'pending'
    )
    UPDATE steps SET state = 'in_doubt' WHERE run_id = :id AND state = 'intended'
""")


async def cancel(connection: AsyncConnection, run_id: UUID, tenant: str, *, actor: str) -> Run | None:
    """queued, running, waiting → cancelled. None: no such run, or it has ended.

    A worker that holds it loses its lease by this and can write nothing more; a call that it had begun, and that
    cannot be repeated, is `in_doubt` from now on.
    """
    row = await fetch_one(
        connection,
        _CANCEL,
        {"id": run_id, "tenant": tenant, **audit_parameters(actor, AuditEntry(AuditKind.RUN_CANCELLED))},
    )
    if row is None:
        return None
    await connection.execute(_CANCEL_LATE, {"id": run_id})
    return run_of(row)
