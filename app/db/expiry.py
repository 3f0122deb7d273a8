"""Reviews that nobody decided in time: the run ends, goes on without the call, or a second queue is asked.

One transaction. Its first statement locks the runs; only what follows, on a fresh snapshot, looks at their reviews. So
a decision that was committed at the last moment is seen, and one that comes now waits, and finds its review expired.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.audit import append_each
from app.db.fetch import Row, fetch
from app.db.runs import LOCK_IDLE_SECONDS
from app.domain.agent import OnExpiry
from app.domain.audit import AuditEntry, AuditKind
from app.domain.review import ReviewKind, ReviewQueue
from app.domain.run import RunStatus, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """What became of the runs. `reviews`: how many were due."""

    ended: tuple[UUID, ...] = ()
    queued: tuple[UUID, ...] = ()
    reviews: int = 0


# From the partial index on `expires_at`: ten thousand that wait and are not due cost nothing.
_LOCK = text("""
    WITH due AS MATERIALIZED (
        SELECT run_id FROM reviews WHERE status = 'pending' AND expires_at <= now() ORDER BY expires_at LIMIT :limit
    )
    SELECT id, status, set_config('idle_in_transaction_session_timeout', CAST(:idle_ms AS text), true)
    FROM runs WHERE id IN (SELECT run_id FROM due) ORDER BY id FOR UPDATE SKIP LOCKED
""")

_DUE = text("""
    SELECT id, run_id, kind, queue, on_expiry FROM reviews
    WHERE run_id = ANY(:runs) AND status = 'pending' AND expires_at <= now() ORDER BY id
""")

_EXPIRE = text("UPDATE reviews SET status = 'expired' WHERE id = ANY(:reviews)")

_ESCALATE = text("""
    UPDATE reviews SET queue = 'second', expires_at = now() + make_interval(secs => expires_s) WHERE id = ANY(:reviews)
""")

_END = text("""
    UPDATE runs SET status = 'failed', stop_reason = 'review_expired', ended_at = now(), unreported = true
    WHERE id = ANY(:runs)
""")

_VOID = text("UPDATE reviews SET status = 'void' WHERE run_id = ANY(:runs) AND status = 'pending'")

_RESUME = text("""
    UPDATE runs SET status = 'queued', queued_at = now(), needs_enqueue = true
    WHERE id = ANY(:runs) AND status = 'waiting'
      AND NOT EXISTS (SELECT FROM reviews WHERE run_id = runs.id AND reviews.status = 'pending')
    RETURNING id
""")


async def expire_due(connection: AsyncConnection, *, limit: int) -> Expired:
    """Expire or escalate up to `limit` reviews that are due. In a transaction of its own.

    A run whose row somebody holds is left to the next sweep: it may be about to be decided.
    """
    locked = await fetch(connection, _LOCK, {"limit": limit, "idle_ms": int(LOCK_IDLE_SECONDS * 1000)})
    if not locked:
        return Expired()
    waiting = [row["id"] for row in locked if row["status"] == RunStatus.WAITING]
    due = await fetch(connection, _DUE, {"runs": waiting})
    ended = {row["run_id"] for row in due if _outcome(row) is OnExpiry.END}
    going_on = {row["run_id"] for row in due} - ended
    escalated = {row["id"] for row in due if _outcome(row) is OnExpiry.ESCALATE and row["run_id"] in going_on}
    over = ended.union(row["id"] for row in locked if row["status"] != RunStatus.WAITING)

    await connection.execute(_EXPIRE, {"reviews": [row["id"] for row in due if row["id"] not in escalated]})
    await connection.execute(_ESCALATE, {"reviews": list(escalated)})
    await connection.execute(_END, {"runs": list(ended)})
    await connection.execute(_VOID, {"runs": list(over)})
    queued = {row["id"] for row in await fetch(connection, _RESUME, {"runs": list(going_on)})}

    events = _events(due, escalated)
    for run_id in ended:
        events[run_id].append(AuditEntry(AuditKind.RUN_FAILED, {"stop_reason": StopReason.REVIEW_EXPIRED}))
    for run_id in queued:
        events[run_id].append(AuditEntry(AuditKind.RUN_REQUEUED, {"why": "review expired"}))
    await append_each(connection, events, actor="sweeper")
    return Expired(ended=tuple(sorted(ended)), queued=tuple(sorted(queued)), reviews=len(due))


def _outcome(review: Row) -> OnExpiry:
    """What follows. The second queue is the last one; and a call in doubt or a limit cannot be rejected by silence."""
    match OnExpiry(review["on_expiry"]), ReviewQueue(review["queue"]), ReviewKind(review["kind"]):
        case OnExpiry.ESCALATE, ReviewQueue.FIRST, _:
            return OnExpiry.ESCALATE
        case OnExpiry.REJECT, _, ReviewKind.APPROVAL | ReviewKind.QUESTION:
            return OnExpiry.REJECT
        case _:
            return OnExpiry.END


def _events(due: Sequence[Row], escalated: Container[UUID]) -> dict[UUID, list[AuditEntry]]:
    events: dict[UUID, list[AuditEntry]] = {}
    for review in due:
        data: dict[str, JsonValue] = {"id": str(review["id"])}
        if review["id"] in escalated:
            event = AuditEntry(AuditKind.REVIEW_ESCALATED, {**data, "queue": ReviewQueue.SECOND})
        else:
            event = AuditEntry(AuditKind.REVIEW_EXPIRED, data)
        events.setdefault(review["run_id"], []).append(event)
    return events
