"""The audit: written only by the database function `append_audit`, inside the statement it records."""

import json
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.audit import AuditEntry, AuditEvent


def audit_parameters(actor: str, *entries: AuditEntry) -> dict[str, str]:
    """The parameters `:actor` and `:events` of a statement that calls `append_audit(id, tenant, :actor, :events)`."""
    return {"actor": actor, "events": json.dumps([{"kind": entry.kind, "data": entry.data} for entry in entries])}


_EVENTS = text("""
    SELECT run_id, seq, at, actor, kind, data FROM audit_events
    WHERE run_id = :run_id AND tenant = :tenant AND seq > :after ORDER BY seq LIMIT :limit
""")


async def events_of(
    connection: AsyncConnection, run_id: UUID, tenant: str, *, after: int, limit: int
) -> Sequence[AuditEvent]:
    """Events of a run in order, those after `after`."""
    result = await connection.execute(_EVENTS, {"run_id": run_id, "tenant": tenant, "after": after, "limit": limit})
    return [AuditEvent(**row) for row in result.mappings()]
