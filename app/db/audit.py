"""The audit: written only by the database function `append_audit`, inside the statement it records."""

import json
from collections.abc import Mapping, Sequence
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.fetch import fetch
from app.domain.audit import AuditEntry, AuditEvent
from app.domain.canonical import canonical_json


def audit_parameters(actor: str, *entries: AuditEntry) -> dict[str, str]:
    """The parameters `:actor` and `:events` of a statement that calls `append_audit(id, tenant, :actor, :events)`.

    `data` and `payload` go as text: the very bytes that are hashed.
    """
    return {"actor": actor, "events": json.dumps([_row(entry) for entry in entries])}


def _row(entry: AuditEntry) -> dict[str, str]:
    row = {"kind": entry.kind.value, "data": canonical_json(entry.data)}
    if entry.payload is not None:
        row["payload"] = canonical_json(entry.payload)
    return row


_APPEND = text("""
    SELECT append_audit(id, tenant, :actor, CAST(:events AS jsonb))
    FROM (SELECT id, tenant FROM runs WHERE id = ANY(CAST(:ids AS uuid[])) ORDER BY id) AS run
""")


async def append(connection: AsyncConnection, run_ids: Sequence[UUID], entry: AuditEntry, *, actor: str) -> None:
    """Record the same of several runs. What appends to several runs does so in the order of their ids."""
    await fetch(connection, _APPEND, {"ids": list(run_ids), **audit_parameters(actor, entry)})


_APPEND_EACH = text("""
    SELECT append_audit(id, tenant, :actor, CAST(events AS jsonb))
    FROM (SELECT id, tenant, events
          FROM runs JOIN unnest(CAST(:ids AS uuid[]), CAST(:events AS text[])) AS own (id, events) USING (id)
          ORDER BY id) AS run
""")


async def append_each(connection: AsyncConnection, events: Mapping[UUID, Sequence[AuditEntry]], *, actor: str) -> None:
    """Record of several runs what happened to each, in the order of their ids."""
    entries = [json.dumps([_row(entry) for entry in its]) for its in events.values()]
    await fetch(connection, _APPEND_EACH, {"ids": list(events), "events": entries, "actor": actor})


_EVENTS = text("""
    SELECT run_id, seq, at, actor, kind, data, encode(payload_sha256, 'hex') AS payload_sha256, payload,
           encode(hash, 'hex') AS hash
    FROM audit_events LEFT JOIN audit_payloads USING (run_id, seq)
    WHERE run_id = :run_id AND tenant = :tenant AND seq > :after ORDER BY seq LIMIT :limit
""")


async def events_of(
    connection: AsyncConnection, run_id: UUID, tenant: str, *, after: int, limit: int
) -> Sequence[AuditEvent]:
    """Events of a run in order, those after `after`."""
    rows = await fetch(connection, _EVENTS, {"run_id": run_id, "tenant": tenant, "after": after, "limit": limit})
    return [AuditEvent(**{**row, "payload": _payload_of(row["payload"])}) for row in rows]


def _payload_of(stored: str | None) -> JsonValue:
    payload: JsonValue = None if stored is None else json.loads(stored)
    return payload
