"""What the sweeper asks of Postgres: its lock, and which queued runs Redis ought to know."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import CursorResult, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.run import Priority

_SWEEP_LOCK = 7_261_402_119
_GRACE = "now() - interval '5 seconds'"
"""Younger queued runs may be on their way: between the commit and Redis, or between Redis and the claim."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A run that is to be put on the queue. `attempt` tells this stay there from a later one: each claim counts it."""

    id: UUID
    priority: Priority
    attempt: int


_TRY_LOCK = text("""
    SELECT pg_try_advisory_xact_lock(:key),
           set_config('idle_in_transaction_session_timeout', CAST(:idle_ms AS text), true)
""")


async def try_lock(connection: AsyncConnection, *, idle_seconds: float) -> bool:
    """Become the one that sweeps, until the transaction ends, or has been idle for so long: its process is frozen."""
    parameters = {"key": _SWEEP_LOCK, "idle_ms": int(idle_seconds * 1000)}
    return bool((await connection.execute(_TRY_LOCK, parameters)).one()[0])


_MARKED = text("""
    SELECT id, priority, attempt FROM runs WHERE needs_enqueue AND status = 'queued' ORDER BY id LIMIT :limit
""")


async def marked_for_enqueue(connection: AsyncConnection, *, limit: int) -> Sequence[Queued]:
    """Runs that Redis did not take, or of which nobody can say whether it has: oldest first."""
    return _queued(await connection.execute(_MARKED, {"limit": limit}))


_UNMARK = text("""
    WITH free AS (
        SELECT id FROM runs JOIN unnest(CAST(:ids AS uuid[]), CAST(:attempts AS int[])) AS enqueued (id, attempt)
                            USING (id, attempt)
        WHERE needs_enqueue AND status = 'queued' FOR UPDATE OF runs SKIP LOCKED
    )
    UPDATE runs SET needs_enqueue = false FROM free WHERE runs.id = free.id
""")


async def unmark(connection: AsyncConnection, runs: Sequence[Queued]) -> int:
    """They are in Redis now. A run that was handed back and marked anew meanwhile keeps its mark. Returns how many."""
    parameters = {"ids": [run.id for run in runs], "attempts": [run.attempt for run in runs]}
    return (await connection.execute(_UNMARK, parameters)).rowcount


_COUNT = text(f"""
    SELECT count(*) FROM (
        SELECT FROM runs WHERE status = 'queued' AND queued_at < {_GRACE} ORDER BY id LIMIT :limit
    ) AS old
""")  # noqa: S608 - the fragment is a constant


async def count_queued(connection: AsyncConnection, *, limit: int) -> int:
    """How many runs are queued and old enough that Redis has to know them. Counts no further than `limit`."""
    return int((await connection.execute(_COUNT, {"limit": limit})).scalar_one())


# EXCEPT, because it hashes or sorts whatever the planner believes: a join over stale statistics may be a nested loop
# over 100,000 runs times 100,000 ids.
_MISSING = text(f"""
    WITH missing AS (
        SELECT id FROM runs WHERE status = 'queued' AND queued_at < {_GRACE} AND id > :after
        EXCEPT SELECT unnest(CAST(string_to_array(:known, ',') AS uuid[]))
        ORDER BY id LIMIT :limit
    )
    SELECT id, priority, attempt FROM runs JOIN missing USING (id) WHERE status = 'queued' ORDER BY id
""")  # noqa: S608


async def missing(connection: AsyncConnection, known: str, *, after: UUID, limit: int) -> Sequence[Queued]:
    """The oldest queued runs after this one that are not among the known ones: ids, joined by commas.

    In a transaction that began before Redis was asked for what it knows: then a run that was accepted meanwhile is
    young enough not to be missed.
    """
    return _queued(await connection.execute(_MISSING, {"known": known, "after": after, "limit": limit}))


_AT_REST = text(f"""
    SELECT id FROM runs
    WHERE id = ANY(CAST(:ids AS uuid[]))
      AND (ended_at < {_GRACE}
           OR status = 'waiting' AND EXISTS (SELECT FROM reviews WHERE run_id = runs.id AND created_at < {_GRACE}))
""")  # noqa: S608


async def at_rest(connection: AsyncConnection, run_ids: Iterable[UUID]) -> Sequence[UUID]:
    """Those of the runs that ended, or began to wait for a person, long enough ago for Redis to have heard of it."""
    result = await connection.execute(_AT_REST, {"ids": list(run_ids)})
    return [row["id"] for row in result.mappings()]


def _queued(result: CursorResult[Any]) -> Sequence[Queued]:
    return [Queued(row["id"], Priority(row["priority"]), row["attempt"]) for row in result.mappings()]
