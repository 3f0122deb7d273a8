"""The outbox of webhooks. A trigger on `runs` (`notify_webhooks`) fills it in the transaction of each transition.

Whoever sends a delivery has claimed it first: its next attempt, by somebody else, is put so far off that an answer
would have come. The clock is Postgres'. What takes several rows at once skips those that somebody holds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.fetch import Row, fetch, fetch_one
from app.domain.webhook import Delivery, DeliveryError, DeliveryStatus, WebhookEvent

_COLUMNS = """
    id, webhook_id, run_id, event, status, attempts, last_status, last_error,
    CASE WHEN status = 'pending' THEN next_attempt_at END AS next_attempt_at, created_at, ended_at
"""


def _delivery_of(row: Row) -> Delivery:
    return Delivery(
        **{
            **row,
            "event": WebhookEvent(row["event"]),
            "status": DeliveryStatus(row["status"]),
            "last_error": DeliveryError(row["last_error"]) if row["last_error"] else None,
        }
    )


# --- as the tenant sees it ------------------------------------------------------------------------------------------

# As one condition on an index; and a page that follows a delivery that is forgotten by now is empty.
_OLDER = """
    number < CASE WHEN CAST(:before AS uuid) IS NULL THEN 9223372036854775807
                  ELSE (SELECT number FROM webhook_deliveries WHERE id = :before AND tenant = :tenant) END
"""
_OF_WEBHOOK = text(f"""
    SELECT {_COLUMNS} FROM webhook_deliveries WHERE webhook_id = :id AND tenant = :tenant AND {_OLDER}
    ORDER BY number DESC LIMIT :limit
""")  # noqa: S608 - the fragments in this module are constants
_OF_RUN = text(f"""
    SELECT {_COLUMNS} FROM webhook_deliveries WHERE run_id = :id AND tenant = :tenant AND {_OLDER}
    ORDER BY number DESC LIMIT :limit
""")  # noqa: S608


async def of_webhook(
    connection: AsyncConnection, webhook_id: UUID, tenant: str, *, before: UUID | None, limit: int
) -> Sequence[Delivery]:
    """Newest first. `before`: where the previous page ended."""
    parameters = {"id": webhook_id, "tenant": tenant, "before": before, "limit": limit}
    return [_delivery_of(row) for row in await fetch(connection, _OF_WEBHOOK, parameters)]


async def of_run(
    connection: AsyncConnection, run_id: UUID, tenant: str, *, before: UUID | None, limit: int
) -> Sequence[Delivery]:
    """Newest first, to whichever webhook; also to one that was deleted since."""
    parameters = {"id": run_id, "tenant": tenant, "before": before, "limit": limit}
    return [_delivery_of(row) for row in await fetch(connection, _OF_RUN, parameters)]


_REDELIVER = text(f"""
    UPDATE webhook_deliveries SET status = 'pending', attempts = 0, next_attempt_at = now(), ended_at = NULL
    WHERE id = :id AND webhook_id = :webhook_id AND tenant = :tenant
    RETURNING {_COLUMNS}
""")  # noqa: S608


async def redeliver(connection: AsyncConnection, delivery_id: UUID, webhook_id: UUID, tenant: str) -> Delivery | None:
    """Send it once more, right away, as if it had just happened. None: it is missing, or another tenant's."""
    parameters = {"id": delivery_id, "webhook_id": webhook_id, "tenant": tenant}
    row = await fetch_one(connection, _REDELIVER, parameters)
    return _delivery_of(row) if row else None


# --- as a deliverer sees it -----------------------------------------------------------------------------------------


class Due(NamedTuple):
    """A webhook that something is due for. `is_closed`: it is disabled, or was deleted."""

    webhook_id: UUID
    tenant: str
    is_failing: bool
    is_closed: bool


# From one webhook to the next within the partial index: one look into it for each, however much is pending.
_DUE = text("""
    WITH RECURSIVE pending AS (
        (SELECT webhook_id, next_attempt_at FROM webhook_deliveries WHERE status = 'pending'
         ORDER BY webhook_id, next_attempt_at LIMIT 1)
        UNION ALL
        SELECT following.webhook_id, following.next_attempt_at FROM pending CROSS JOIN LATERAL (
            SELECT webhook_id, next_attempt_at FROM webhook_deliveries
            WHERE status = 'pending' AND webhook_id > pending.webhook_id
            ORDER BY webhook_id, next_attempt_at LIMIT 1
        ) AS following
    )
    SELECT webhook_id, coalesce(tenant, '') AS tenant, failing_since IS NOT NULL AS is_failing,
           webhooks.id IS NULL OR disabled_at IS NOT NULL AS is_closed
    FROM pending LEFT JOIN webhooks ON webhooks.id = webhook_id
    WHERE next_attempt_at <= now() OR webhooks.id IS NULL OR disabled_at IS NOT NULL
""")


async def due(connection: AsyncConnection) -> Sequence[Due]:
    """The webhooks that have something to be sent now, and those that have something that never will be."""
    return [Due(**row) for row in await fetch(connection, _DUE, {})]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A delivery that is to be sent now. `attempt` counts from 1; `sent_at`: seconds since 1970."""

    id: UUID
    tenant: str
    webhook_id: UUID
    url: str
    body: str
    attempt: int
    sent_at: int


# An array, because the planner takes what `due` gives for many rows, and would read the whole table to join them.
_CLAIM = text("""
    WITH wanted AS (
        SELECT * FROM unnest(CAST(:webhooks AS uuid[]), CAST(:most AS int[])) AS wanted (webhook_id, most)
    ), due AS (
        SELECT due.id FROM wanted CROSS JOIN LATERAL (
            SELECT id FROM webhook_deliveries
            WHERE webhook_id = wanted.webhook_id AND status = 'pending' AND next_attempt_at <= now()
            ORDER BY next_attempt_at LIMIT wanted.most FOR UPDATE SKIP LOCKED
        ) AS due
    ), claimed AS (
        UPDATE webhook_deliveries
        SET attempts = attempts + 1, next_attempt_at = now() + make_interval(secs => :lease_seconds)
        WHERE id = ANY(ARRAY(SELECT id FROM due))
        RETURNING webhook_deliveries.*
    )
    SELECT claimed.id, claimed.tenant, webhook_id, url, body, attempts AS attempt,
           CAST(extract(epoch FROM now()) AS bigint) AS sent_at
    FROM claimed JOIN webhooks ON webhooks.id = webhook_id AND disabled_at IS NULL
""")


async def claim(connection: AsyncConnection, wanted: Mapping[UUID, int], *, lease_seconds: float) -> Sequence[Claimed]:
    """Up to so many due deliveries of each webhook, the longest due first, for nobody else for `lease_seconds`."""
    parameters = {"webhooks": list(wanted), "most": list(wanted.values()), "lease_seconds": lease_seconds}
    return [Claimed(**row) for row in await fetch(connection, _CLAIM, parameters)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of an attempt. `error`: None when it was delivered. `retry_s`: seconds until the next attempt; None:
    there is none."""

    id: UUID
    attempt: int
    status: int | None
    error: DeliveryError | None
    retry_s: float | None = None


# A success counts whoever reports it; a failure only of the newest attempt. The webhooks' rows are locked in the order
# of their ids, and only those that change.
_SETTLE = text("""
    WITH told AS (
        SELECT * FROM jsonb_to_recordset(CAST(:outcomes AS jsonb))
                 AS told (id uuid, attempt int, status text, last_status int, last_error text, retry_s float)
    ), settled AS (
        UPDATE webhook_deliveries AS sent
        SET status = told.status, last_status = told.last_status, last_error = told.last_error,
            next_attempt_at = now() + make_interval(secs => coalesce(told.retry_s, 0)),
            ended_at = CASE WHEN told.status <> 'pending' THEN now() END
        FROM told
        WHERE sent.id = told.id AND sent.status = 'pending' AND (told.status = 'delivered' OR attempts = told.attempt)
        RETURNING webhook_id, told.status, told.last_error
    ), health AS (
        SELECT webhook_id, bool_or(status = 'delivered') AS works, bool_or(status = 'failed') AS has_given_up,
               bool_or(last_error IS NOT DISTINCT FROM 'gone') AS is_gone
        FROM settled GROUP BY webhook_id
    ), changed AS (
        SELECT id, works, is_gone,
               has_given_up AND NOT works AND failing_since < now() - make_interval(secs => :patience) AS is_dead
        FROM webhooks JOIN health ON webhook_id = id
        WHERE works = (failing_since IS NOT NULL) OR is_gone OR has_given_up
        ORDER BY id FOR NO KEY UPDATE OF webhooks
    )
    UPDATE webhooks
    SET failing_since = CASE WHEN NOT works THEN coalesce(failing_since, now()) END,
        disabled_at = CASE WHEN is_gone OR is_dead THEN coalesce(disabled_at, now()) ELSE disabled_at END,
        disabled_why = CASE WHEN disabled_at IS NOT NULL THEN disabled_why
                            WHEN is_gone THEN 'the endpoint answered 410 Gone'
                            WHEN is_dead THEN 'every delivery has failed for days' END
    FROM changed WHERE webhooks.id = changed.id
    RETURNING webhooks.id, disabled_at IS NOT NULL AND (is_gone OR is_dead) AS was_disabled
""")


async def settle(connection: AsyncConnection, outcomes: Sequence[Outcome], *, patience_s: float) -> Sequence[UUID]:
    """Write down what came of attempts. Returns the webhooks that were disabled by that: those that are gone, and those
    that have given up a message when nothing had been delivered to them for `patience_s`."""
    told = [
        {
            "id": str(outcome.id),
            "attempt": outcome.attempt,
            "status": _status_after(outcome),
            "last_status": outcome.status,
            "last_error": outcome.error,
            "retry_s": outcome.retry_s,
        }
        for outcome in outcomes
    ]
    rows = await fetch(connection, _SETTLE, {"outcomes": json.dumps(told), "patience": patience_s})
    return [row["id"] for row in rows if row["was_disabled"]]


def _status_after(outcome: Outcome) -> DeliveryStatus:
    if outcome.error is None:
        return DeliveryStatus.DELIVERED
    return DeliveryStatus.FAILED if outcome.retry_s is None else DeliveryStatus.PENDING


_CLOSE = text("""
    UPDATE webhook_deliveries AS closed
    SET status = 'failed', ended_at = now(),
        last_error = CASE WHEN EXISTS (SELECT FROM webhooks WHERE webhooks.id = closed.webhook_id)
                          THEN 'webhook_disabled' ELSE 'webhook_deleted' END
    WHERE id IN (SELECT id FROM webhook_deliveries WHERE webhook_id = ANY(:webhooks) AND status = 'pending'
                 LIMIT :limit FOR UPDATE SKIP LOCKED)
    RETURNING id
""")


async def close(connection: AsyncConnection, webhook_ids: Sequence[UUID], *, limit: int) -> int:
    """End what is pending for webhooks that were disabled or deleted. Returns how many."""
    return len(await fetch(connection, _CLOSE, {"webhooks": list(webhook_ids), "limit": limit}))


_FORGET = text("""
    DELETE FROM webhook_deliveries
    WHERE id IN (SELECT id FROM webhook_deliveries
                 WHERE status <> 'pending' AND ended_at < now() - make_interval(secs => :older_than)
                 ORDER BY ended_at LIMIT :limit FOR UPDATE SKIP LOCKED)
    RETURNING id
""")


async def forget(connection: AsyncConnection, *, older_than_s: float, limit: int) -> int:
    """Delete what ended so long ago, the oldest first. Returns how many."""
    return len(await fetch(connection, _FORGET, {"older_than": older_than_s, "limit": limit}))
