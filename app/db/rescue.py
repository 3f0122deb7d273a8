"""Running runs that their workers do not end any more: a lease that is over, a deadline that is long past.

Each is one statement, and a run whose row somebody holds is left to the next sweep. The clock is Postgres'. What
appends to the audit of several runs does so in the order of their ids, or two that do would wait for each other; for
the same reason the budgets that are settled are locked first, in the order of their tenants.
"""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.run import RunStatus

_RESCUE = text("""
    WITH expired AS MATERIALIZED (
        SELECT id, tenant, worker, attempt, lost_leases + 1 >= CAST(limits ->> 'max_attempts' AS int) AS is_last
        FROM runs WHERE status = 'running' AND lease_until < now()
        ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
    ), settled AS MATERIALIZED (
        SELECT FROM budgets WHERE tenant IN (SELECT tenant FROM expired) ORDER BY tenant FOR NO KEY UPDATE
    ), rescued AS (
        UPDATE runs
        SET status = CASE WHEN is_last THEN 'failed' ELSE 'queued' END,
            stop_reason = CASE WHEN is_last THEN 'max_attempts' END,
            ended_at = CASE WHEN is_last THEN now() END, unreported = is_last,
            lost_leases = lost_leases + 1, queued_at = now(), needs_enqueue = NOT is_last,
            active_ms = active_ms + extract(epoch FROM least(lease_until, now()) - running_since) * 1000,
            lease_token = NULL, lease_until = NULL, running_since = NULL
        FROM expired WHERE runs.id = expired.id
          AND (SELECT count(*) FROM settled) >= 0  -- before the first run is
        RETURNING runs.id, runs.tenant, runs.status, expired.worker, expired.attempt, is_last
    ), doubted AS (
        UPDATE steps SET state = 'in_doubt' FROM rescued WHERE run_id = rescued.id AND is_last AND state = 'intended'
    )
    SELECT id, status,
           append_audit(id, tenant, 'sweeper', jsonb_build_array(jsonb_build_object(
               'kind', CASE WHEN is_last THEN 'run.failed' ELSE 'run.requeued' END,
               'data', jsonb_build_object('why', 'lease expired', 'lost_worker', worker, 'attempt', attempt)
                    || CASE WHEN is_last THEN jsonb_build_object('stop_reason', 'max_attempts') ELSE '{}' END)))
    FROM (SELECT * FROM rescued ORDER BY id) AS rescued
""")


async def rescue_expired(connection: AsyncConnection, *, limit: int) -> tuple[Sequence[UUID], Sequence[UUID]]:
    """running, but the lease is over → queued and marked, or failed after `max_attempts`: (queued runs, ended runs)."""
    rows = list((await connection.execute(_RESCUE, {"limit": limit})).mappings())
    requeued = [row["id"] for row in rows if row["status"] == RunStatus.QUEUED]
    ended = [row["id"] for row in rows if row["status"] != RunStatus.QUEUED]
    return requeued, ended


_END_OVERDUE = text("""
    WITH overdue AS MATERIALIZED (
        SELECT id, tenant, worker, attempt FROM runs
        WHERE status = 'running'
          AND active_ms + extract(epoch FROM least(lease_until, now()) - running_since) * 1000
              > (CAST(limits ->> 'deadline_s' AS numeric) + :grace_seconds) * 1000
        ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
    ), settled AS MATERIALIZED (
        SELECT FROM budgets WHERE tenant IN (SELECT tenant FROM overdue) ORDER BY tenant FOR NO KEY UPDATE
    ), ended AS (
        UPDATE runs
        SET status = 'failed', stop_reason = 'deadline', ended_at = now(), unreported = true,
            active_ms = active_ms + extract(epoch FROM least(lease_until, now()) - running_since) * 1000,
            lease_token = NULL, lease_until = NULL, running_since = NULL
        FROM overdue WHERE runs.id = overdue.id
          AND (SELECT count(*) FROM settled) >= 0  -- before the first run is
        RETURNING runs.id, runs.tenant, overdue.worker, overdue.attempt
    ), doubted AS (
        UPDATE steps SET state = 'in_doubt' FROM ended WHERE run_id = ended.id AND state = 'intended'
    )
    SELECT id,
           append_audit(id, tenant, 'sweeper', jsonb_build_array(jsonb_build_object(
               'kind', 'run.failed',
               'data', jsonb_build_object('stop_reason', 'deadline', 'why', 'its worker did not end it in time',
                                          'lost_worker', worker, 'attempt', attempt))))
    FROM (SELECT * FROM ended ORDER BY id) AS ended
""")


async def end_overdue(connection: AsyncConnection, *, grace_seconds: float, limit: int) -> Sequence[UUID]:
    """running → failed, where the running time is so far past the deadline that its worker will not end it any more.

    Whoever holds it: a living worker loses its lease by this. Running time ends with the lease, so a run whose worker
    died is not charged for the time until somebody noticed; where the deadline had passed by then, another attempt
    could only say so too. Returns the runs that ended.
    """
    parameters = {"grace_seconds": grace_seconds, "limit": limit}
    return [row["id"] for row in (await connection.execute(_END_OVERDUE, parameters)).mappings()]
