"""How the whole service stands at this moment: what is queued, waits, is stuck, is not sealed.

Three statements on partial indexes, so that runs that have ended cost nothing, however many there are. 100,000 queued
runs cost a tenth of a second: they are counted one by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.fetch import fetch, fetch_one
from app.domain.review import ReviewKind, ReviewQueue
from app.domain.run import RunStatus

MAX_UNSEALED = 100_000
"""Of the runs whose audit is not sealed, so many are counted: where nobody seals, it is all of them."""
_OLDEST_UNSEALED = 1_000
"""Of so many runs that are not sealed, the oldest ones, it is looked when they were written to."""
STUCK = (
    "running with a lease that was over, or past the deadline, more than a minute ago; queued for more than an hour;"
    " or waiting without a review that is pending"
)
"""What is said of a run that nobody will end, as far as can be seen. `_RUNS` says the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """Ages are in seconds, by Postgres' clock; 0 where there is nothing that could have one.

    `runs`: by agent and state, those that have not ended. `stuck_runs`: see `STUCK`. `reviews`: those that are pending.
    `unsealed_runs`: whose audit has changed since it was sealed, up to `MAX_UNSEALED`. `oldest_unsealed_s`: for how
    long one of them has been as it is.
    """

    runs: Mapping[tuple[str, RunStatus], int]
    oldest_queued_s: float
    stuck_runs: int
    reviews: Mapping[tuple[ReviewQueue, ReviewKind], int]
    oldest_review_s: float
    unsealed_runs: int
    oldest_unsealed_s: float
    unanchored_checkpoints: int


_RUNS = text("""
    SELECT 'queued' AS status, agent, count(*) AS runs,
           count(*) FILTER (WHERE queued_at < now() - interval '1 hour') AS stuck,
           CAST(extract(epoch FROM now() - min(queued_at)) AS double precision) AS oldest_s
    FROM runs WHERE status = 'queued' GROUP BY agent
    UNION ALL
    SELECT 'running', agent, count(*), count(*) FILTER (
               WHERE lease_until < now() - interval '1 minute'
                  OR active_ms + extract(epoch FROM now() - running_since) * 1000
                     > (CAST(limits ->> 'deadline_s' AS numeric) + 60) * 1000), 0
    FROM runs WHERE status = 'running' GROUP BY agent
    UNION ALL
    SELECT 'waiting', agent, count(*), count(*) FILTER (WHERE asked.run_id IS NULL), 0
    FROM runs LEFT JOIN (
        SELECT DISTINCT run_id FROM reviews WHERE status = 'pending') AS asked ON asked.run_id = runs.id
    WHERE status = 'waiting' GROUP BY agent
""")

_REVIEWS = text("""
    SELECT queue, kind, count(*) AS reviews,
           CAST(extract(epoch FROM now() - min(created_at)) AS double precision) AS oldest_s
    FROM reviews WHERE status = 'pending' GROUP BY queue, kind
""")

# A run's id tells when it was submitted, and its newest event when it was written to: of those that were submitted
# first, the one that has not changed for longest.
_AUDIT = text("""
    SELECT
        (SELECT count(*) FROM (
            SELECT FROM audit_heads WHERE NOT is_sealed LIMIT :max_unsealed) AS unsealed) AS unsealed,
        (SELECT CAST(extract(epoch FROM now() - min(at)) AS double precision) FROM (
            SELECT run_id, seq FROM audit_heads WHERE NOT is_sealed ORDER BY run_id LIMIT :oldest
        ) AS oldest JOIN audit_events USING (run_id, seq)) AS oldest_s,
        (SELECT count(*) FROM audit_checkpoints WHERE anchored_at IS NULL) AS unanchored
""")


async def read_state(connection: AsyncConnection) -> ServiceState:
    """What all processes together have to do, and have not done."""
    runs = await fetch(connection, _RUNS, {})
    reviews = await fetch(connection, _REVIEWS, {})
    audit = await fetch_one(connection, _AUDIT, {"max_unsealed": MAX_UNSEALED, "oldest": _OLDEST_UNSEALED})
    assert audit is not None
    return ServiceState(
        runs={(row["agent"], RunStatus(row["status"])): row["runs"] for row in runs},
        oldest_queued_s=max((row["oldest_s"] for row in runs), default=0.0),
        stuck_runs=sum(row["stuck"] for row in runs),
        reviews={(ReviewQueue(row["queue"]), ReviewKind(row["kind"])): row["reviews"] for row in reviews},
        oldest_review_s=max((row["oldest_s"] for row in reviews), default=0.0),
        unsealed_runs=audit["unsealed"],
        oldest_unsealed_s=audit["oldest_s"] or 0.0,
        unanchored_checkpoints=audit["unanchored"],
    )
