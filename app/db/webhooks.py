"""Webhooks as their tenant sees them: create, read, list, delete. What is sent to them is in `deliveries`."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.fetch import Row, fetch, fetch_one
from app.db.runs import LOCK_IDLE_SECONDS
from app.domain.ids import new_id
from app.domain.webhook import MAX_WEBHOOKS, Webhook, WebhookEvent

_TENANT_LOCK = 7_261_402
COLUMNS = "id, tenant, url, events, created_at, created_by, failing_since, disabled_at, disabled_why"


def _webhook_of(row: Row) -> Webhook:
    return Webhook(**{**row, "events": tuple(WebhookEvent(event) for event in row["events"])})


_HOLD_TENANT = text("""
    SELECT set_config('idle_in_transaction_session_timeout', CAST(:idle_ms AS text), true),
           pg_advisory_xact_lock(:key, hashtext(:tenant))
""")

_CREATE = text(f"""
    INSERT INTO webhooks (id, tenant, url, events, created_by)
    SELECT :id, :tenant, :url, CAST(:events AS text[]), :created_by
    WHERE (SELECT count(*) FROM webhooks WHERE tenant = :tenant) < :most
    RETURNING {COLUMNS}
""")  # noqa: S608 - the columns are a constant


async def create(
    connection: AsyncConnection, *, tenant: str, url: str, events: Sequence[WebhookEvent], created_by: str
) -> Webhook | None:
    """In a transaction of its own. None: the tenant has as many as it may have."""
    held = {"key": _TENANT_LOCK, "tenant": tenant, "idle_ms": int(LOCK_IDLE_SECONDS * 1000)}
    await fetch(connection, _HOLD_TENANT, held)  # so that those created at once are counted
    new = {"id": new_id(), "tenant": tenant, "url": url, "events": list(events), "created_by": created_by}
    row = await fetch_one(connection, _CREATE, {**new, "most": MAX_WEBHOOKS})
    return _webhook_of(row) if row else None


_GET = text(f"SELECT {COLUMNS} FROM webhooks WHERE id = :id AND tenant = :tenant")  # noqa: S608


async def get(connection: AsyncConnection, webhook_id: UUID, tenant: str) -> Webhook | None:
    """The webhook, or None where it is missing or another tenant's."""
    row = await fetch_one(connection, _GET, {"id": webhook_id, "tenant": tenant})
    return _webhook_of(row) if row else None


_LIST = text(f"""
    SELECT {COLUMNS} FROM webhooks WHERE tenant = :tenant AND (CAST(:before AS uuid) IS NULL OR id < :before)
    ORDER BY id DESC LIMIT :limit
""")  # noqa: S608


async def list_newest(
    connection: AsyncConnection, tenant: str, *, before: UUID | None, limit: int
) -> Sequence[Webhook]:
    """Newest first. `before`: where the previous page ended."""
    rows = await fetch(connection, _LIST, {"tenant": tenant, "before": before, "limit": limit})
    return [_webhook_of(row) for row in rows]


_DELETE = text("DELETE FROM webhooks WHERE id = :id AND tenant = :tenant RETURNING id")


async def delete(connection: AsyncConnection, webhook_id: UUID, tenant: str) -> bool:
    """From now on nothing is sent to it, also not what is pending. False: it is missing, or another tenant's."""
    return await fetch_one(connection, _DELETE, {"id": webhook_id, "tenant": tenant}) is not None
