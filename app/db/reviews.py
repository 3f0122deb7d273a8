"""Reviews: asked by `leases.suspend`, decided or expired here, each exactly once."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.audit import audit_parameters
from app.domain.audit import AuditEntry, AuditKind
from app.domain.review import Decision, Review, ReviewKind, ReviewStatus
from app.domain.run import Priority

COLUMNS = """
    id, tenant, run_id, agent, kind, seq, tool, arguments, args_hash, status, decision, reason, response, decided_by,
    created_at, decided_at, expires_at
"""


def _review_of(row: RowMapping) -> Review:
    return Review(
        **{
            **{name: row[name] for name in Review.__dataclass_fields__},
            "kind": ReviewKind(row["kind"]),
            "status": ReviewStatus(row["status"]),
            "decision": Decision(row["decision"]) if row["decision"] else None,
        }
    )


_GET = text(f"SELECT {COLUMNS} FROM reviews WHERE id = :id AND tenant = :tenant")  # noqa: S608 - constant columns


async def get(connection: AsyncConnection, review_id: UUID, tenant: str) -> Review | None:
    """The review, or None where it is missing or another tenant's."""
    row = (await connection.execute(_GET, {"id": review_id, "tenant": tenant})).mappings().one_or_none()
    return _review_of(row) if row else None


_LIST = text(f"""
    SELECT {COLUMNS} FROM reviews
    WHERE tenant = :tenant AND (CAST(:status AS text) IS NULL OR status = :status)
      AND (CAST(:before AS uuid) IS NULL OR id < :before)
    ORDER BY id DESC LIMIT :limit
""")  # noqa: S608


async def list_newest(
    connection: AsyncConnection, tenant: str, *, status: ReviewStatus | None, before: UUID | None, limit: int
) -> Sequence[Review]:
    """Newest first."""
    result = await connection.execute(_LIST, {"tenant": tenant, "status": status, "before": before, "limit": limit})
    return [_review_of(row) for row in result.mappings()]


_OF_RUN = text(f"SELECT {COLUMNS} FROM reviews WHERE run_id = :run_id ORDER BY id")  # noqa: S608


async def of_run(connection: AsyncConnection, run_id: UUID) -> Sequence[Review]:
    """Every review of a run, oldest first. Whose run it is, the caller has checked."""
    return [_review_of(row) for row in (await connection.execute(_OF_RUN, {"run_id": run_id})).mappings()]


_DECIDE = text(f"""
    WITH decided AS (
        UPDATE reviews SET status = 'decided', decision = :decision, reason = :reason, response = :response,
                           decided_by = :actor, decided_at = now()
        WHERE id = :id AND tenant = :tenant AND status = 'pending' AND expires_at > now() AND args_hash = :args_hash
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
    reason: str | None,
    response: str | None,
) -> Review | None:
    """pending → decided. None: somebody else was first, it expired, or the arguments are not those that were seen."""
    entry = AuditEntry(
        AuditKind.REVIEW_DECIDED, {"review": str(review.id), "decision": decision, "args_sha256": args_hash}
    )
    result = await connection.execute(
        _DECIDE,
        {
            "id": review.id,
            "tenant": review.tenant,
            "decision": decision,
            "reason": reason,
            "response": response,
            "args_hash": args_hash,
            **audit_parameters(actor, entry),
        },
    )
    row = result.mappings().one_or_none()
    return _review_of(row) if row else None


_LOCK_RUN = text("SELECT id FROM runs WHERE id = :run_id FOR UPDATE")


async def lock_run(connection: AsyncConnection, run_id: UUID) -> None:
    """Hold the run's row until the transaction ends, so that decisions, expiry and cancel come one after the other."""
    await connection.execute(_LOCK_RUN, {"run_id": run_id})


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
    """waiting → queued, once nothing is left to decide: its priority, for the queue. None: it still waits, or ended."""
    entry = AuditEntry(AuditKind.RUN_REQUEUED, {"why": "decided"})
    result = await connection.execute(_RESUME, {"run_id": run_id, **audit_parameters(actor, entry)})
    row = result.mappings().one_or_none()
    return Priority(row["priority"]) if row else None


_END_WAITING = text("""
    WITH ended AS (
        UPDATE runs SET status = 'failed', stop_reason = :stop_reason, ended_at = now(), error = :error
        WHERE id = :run_id AND status = 'waiting'
        RETURNING id, tenant
    ), voided AS (
        UPDATE reviews SET status = 'void' FROM ended WHERE run_id = ended.id AND reviews.status = 'pending'
    )
    SELECT append_audit(id, tenant, :actor, CAST(:events AS jsonb)) FROM ended
""")


async def reject_run(connection: AsyncConnection, run_id: UUID, *, actor: str, reason: str | None) -> bool:
    """waiting → failed: a reviewer ended the run. False: it was not waiting."""
    entry = AuditEntry(AuditKind.RUN_FAILED, {"stop_reason": "rejected"})
    result = await connection.execute(
        _END_WAITING,
        {"run_id": run_id, "stop_reason": "rejected", "error": reason, **audit_parameters(actor, entry)},
    )
    return result.first() is not None


_EXPIRE = text("""
    WITH due AS (
        SELECT runs.id FROM runs
        WHERE runs.status = 'waiting'
          AND EXISTS (SELECT FROM reviews WHERE run_id = runs.id AND status = 'pending' AND expires_at <= now())
        ORDER BY runs.id LIMIT :limit FOR UPDATE SKIP LOCKED
    ), ended AS (
        UPDATE runs SET status = 'failed', stop_reason = 'review_expired', ended_at = now()
        FROM due WHERE runs.id = due.id AND runs.status = 'waiting'
        RETURNING runs.id, runs.tenant
    ), expired AS (
        UPDATE reviews SET status = CASE WHEN expires_at <= now() THEN 'expired' ELSE 'void' END
        FROM ended WHERE run_id = ended.id AND reviews.status = 'pending'
    )
    SELECT id, append_audit(id, tenant, 'sweeper', CAST(:events AS jsonb)) FROM ended
""")


async def expire_due(connection: AsyncConnection, *, limit: int) -> Sequence[UUID]:
    """waiting → failed, where nobody decided in time. Returns the runs that ended."""
    entries = (
        AuditEntry(AuditKind.REVIEW_EXPIRED),
        AuditEntry(AuditKind.RUN_FAILED, {"stop_reason": "review_expired"}),
    )
    parameters = {"limit": limit, "events": audit_parameters("sweeper", *entries)["events"]}
    return [row["id"] for row in (await connection.execute(_EXPIRE, parameters)).mappings()]
