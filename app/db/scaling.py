"""What the number of workers is decided by, of the whole service, at this moment.

One statement, on the partial indexes of runs that are queued and running, and at most 200 rows of those that have
ended: it costs what the queue costs to count, however many runs there have been.
"""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.fetch import fetch_one
from app.domain.scaling import Load, typical_run_s

# A run whose lease is over is nobody's: the sweeper is about to queue it. Of the runs that have ended, those that no
# worker has ever held say nothing about how long one takes.
_LOAD = text("""
    SELECT
        (SELECT count(*) FROM runs WHERE status = 'queued') + running.left_behind AS queued,
        running.held,
        running.workers,
        running.median_ms AS running_ms,
        (SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY active_ms) FROM (
            SELECT active_ms FROM runs
            WHERE ended_at > now() - interval '15 minutes' AND started_at IS NOT NULL
            ORDER BY ended_at DESC LIMIT 200
        ) AS lately) AS ended_ms
    FROM (
        SELECT count(*) FILTER (WHERE lease_until > now()) AS held,
               count(*) FILTER (WHERE lease_until <= now()) AS left_behind,
               count(DISTINCT worker) FILTER (WHERE lease_until > now()) AS workers,
               percentile_cont(0.5) WITHIN GROUP (
                   ORDER BY active_ms + extract(epoch FROM now() - running_since) * 1000
               ) FILTER (WHERE lease_until > now()) AS median_ms
        FROM runs WHERE status = 'running'
    ) AS running
""")


async def read_load(connection: AsyncConnection) -> Load:
    row = await fetch_one(connection, _LOAD, {})
    assert row is not None
    return Load(
        queued=row["queued"],
        running=row["held"],
        busy_workers=row["workers"],
        median_run_s=typical_run_s(ended_lately_s=_seconds(row["ended_ms"]), running_s=_seconds(row["running_ms"])),
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
