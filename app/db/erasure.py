"""Erasing what people and models wrote about runs that have ended. The events stay, and say so.

Needs the owner of the tables: the service's own user can take nothing out of the audit.
"""

from collections.abc import Sequence
from enum import Enum
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.db.audit import audit_parameters
from app.db.engine import transactional
from app.db.fetch import fetch, fetch_one
from app.domain.audit import AuditEntry, AuditKind
from app.domain.run import RunStatus


class Erased(Enum):
    """What became of a run that was to be erased."""

    NOW = "now"
    BEFORE = "before"
    """There was nothing left to erase."""
    ACTIVE = "active"
    """It has not ended: nothing of it was touched."""
    UNKNOWN = "unknown"
    """There is no such run."""


_MAY_ERASE = text("SELECT has_table_privilege('audit_payloads', 'DELETE') AS may_erase")


async def may_erase(connection: AsyncConnection) -> bool:
    """Is this user the owner?"""
    row = await fetch_one(connection, _MAY_ERASE, {})
    return row is not None and bool(row["may_erase"])


_STATES = text("""
    SELECT id, status, erased_at IS NOT NULL AND NOT EXISTS (SELECT FROM audit_payloads WHERE run_id = id) AS is_erased
    FROM runs WHERE id = ANY(CAST(:ids AS uuid[]))
""")


async def foresee(connection: AsyncConnection, run_ids: Sequence[UUID]) -> dict[UUID, Erased]:
    """What `erase` would do."""
    found = dict.fromkeys(run_ids, Erased.UNKNOWN)
    for row in await fetch(connection, _STATES, {"ids": list(run_ids)}):
        if not RunStatus(row["status"]).is_terminal:
            found[row["id"]] = Erased.ACTIVE
        else:
            found[row["id"]] = Erased.BEFORE if row["is_erased"] else Erased.NOW
    return found


_LOCK = text("""
    SELECT status, erased_at, (SELECT count(*) FROM audit_payloads WHERE run_id = runs.id) AS payloads
    FROM runs WHERE id = :id FOR UPDATE
""")
_APPEND = text("SELECT append_audit(id, tenant, :actor, CAST(:events AS jsonb)) FROM runs WHERE id = :id")
_PAYLOADS = text("DELETE FROM audit_payloads WHERE run_id = :id RETURNING seq")
_RUN = text("""
    UPDATE runs SET input = 'null', metadata = '{}', output = NULL, error = NULL, idempotency_key = NULL,
                    request_hash = '', erased_at = now()
    WHERE id = :id RETURNING id
""")
# What may stay is named, so that whatever a step will say one day goes too. A tool without an effect is one that the
# model made up, or whose arguments did not fit: nothing was called, and its name is the model's word.
_STEPS = text("""
    WITH called AS (
        SELECT DISTINCT body ->> 'tool' AS tool FROM steps WHERE run_id = :id AND body ->> 'effect' IS NOT NULL
    )
    UPDATE steps SET body = CASE kind
        WHEN 'model' THEN jsonb_build_object(
            'model', body -> 'model', 'finish_reason', body -> 'finish_reason', 'usage', body -> 'usage',
            'cost_usd', body -> 'cost_usd', 'duration_ms', body -> 'duration_ms', 'retries', body -> 'retries',
            'tool_calls', (
                SELECT coalesce(jsonb_agg(jsonb_build_object('id', call -> 'id', 'name', coalesce(tool, ''),
                                                             'arguments', '') ORDER BY place), '[]')
                FROM jsonb_array_elements(body -> 'tool_calls') WITH ORDINALITY AS asked (call, place)
                LEFT JOIN called ON tool = call ->> 'name'))
        ELSE jsonb_build_object(
            'call_id', body -> 'call_id', 'effect', body -> 'effect',
            'tool', CASE WHEN body ->> 'effect' IS NULL THEN '' ELSE body ->> 'tool' END,
            'idempotency_key', body -> 'idempotency_key', 'duration_ms', body -> 'duration_ms',
            'arguments', NULL)
        END
    WHERE run_id = :id RETURNING seq
""")
_REVIEWS = text("""
    UPDATE reviews SET arguments = 'null', edited = NULL, reason = NULL, response = NULL, why = '', args_hash = ''
    WHERE run_id = :id RETURNING id
""")


async def erase(engine: AsyncEngine, run_id: UUID, *, why: str, actor: str) -> Erased:
    """One run, in one transaction. Doing it again changes nothing."""
    async with transactional(engine).begin() as connection:
        run = await fetch_one(connection, _LOCK, {"id": run_id})
        if run is None:
            return Erased.UNKNOWN
        if not RunStatus(run["status"]).is_terminal:
            return Erased.ACTIVE
        if run["erased_at"] and not run["payloads"]:
            return Erased.BEFORE
        entry = AuditEntry(AuditKind.RUN_ERASED, {"why": why, "payloads": run["payloads"], "by": actor})
        # First, and with no other event between: only behind it may payloads be deleted.
        await fetch(connection, _APPEND, {"id": run_id, **audit_parameters(actor, entry)})
        for statement in (_PAYLOADS, _STEPS, _REVIEWS, _RUN):
            await fetch(connection, statement, {"id": run_id})
    return Erased.NOW


_OF_SUBJECT = text("""
    SELECT id FROM runs
    WHERE tenant = :tenant AND metadata @> jsonb_build_object(CAST(:key AS text), CAST(:value AS text)) ORDER BY id
""")


async def runs_of_subject(connection: AsyncConnection, tenant: str, key: str, value: str) -> Sequence[UUID]:
    """Those whose metadata name the subject, whatever their state. Reads all of the tenant's runs."""
    rows = await fetch(connection, _OF_SUBJECT, {"tenant": tenant, "key": key, "value": value})
    return [row["id"] for row in rows]


_OLD = text("""
    SELECT id FROM runs
    WHERE ended_at < now() - make_interval(secs => :seconds) AND erased_at IS NULL
      AND (CAST(:tenant AS text) IS NULL OR tenant = :tenant) AND (CAST(:after AS uuid) IS NULL OR id > :after)
    ORDER BY id LIMIT :limit
""")


async def ended_before(
    connection: AsyncConnection, *, seconds: float, tenant: str | None, after: UUID | None, limit: int
) -> Sequence[UUID]:
    """Runs that ended longer ago than that and are not erased, by their ids, those after `after`."""
    parameters = {"seconds": seconds, "tenant": tenant, "after": after, "limit": limit}
    return [row["id"] for row in await fetch(connection, _OLD, parameters)]


_FORGET = text("VACUUM (ANALYZE) runs, steps, reviews, audit_payloads")


async def forget(connection: AsyncConnection) -> None:
    """Clear away what the tables' dead rows and the planner's statistics still hold. Blocks nobody."""
    await connection.execute(_FORGET)
