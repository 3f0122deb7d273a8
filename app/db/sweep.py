"""What the sweeper asks of Postgres: its lock, and which queued runs Redis ought to know."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import CursorResult, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.run import Priority

_SWEEP_LOCK = 7_261_402_119
_GRACE = "now() - interval '5 seconds'"
"""Younger queued runs may be on their way: between the commit and Redis, or between Redis and the claim."""

_TRY_LOCK = text("SELECT pg_try_advisory_xact_lock(:key)")


async def try_lock(connection: AsyncConnection) -> bool:
    """Become the one that sweeps, until the transaction ends."""
    return bool((await connection.execute(_TRY_LOCK, {"key": _SWEEP_LOCK})).scalar_one())


_MARKED = text("SELECT id, priority FROM runs WHERE needs_enqueue AND status = 'queued' ORDER BY id LIMIT :limit")


async def marked_for_enqueue(connection: AsyncConnection, *, limit: int) -> list[tuple[UUID, Priority]]:
    """Runs whose submitter saw that Redis did not take them."""
    return _entries(await connection.execute(_MARKED, {"limit": limit}))


_COUNT = text(f"SELECT count(*) FROM runs WHERE status = 'queued' AND queued_at < {_GRACE}")  # noqa: S608 - constant


async def count_queued(connection: AsyncConnection) -> int:
    """How many runs are queued and old enough that Redis has to know them."""
    return int((await connection.execute(_COUNT)).scalar_one())


_QUEUED = text(f"""
    SELECT id, priority FROM runs WHERE status = 'queued' AND queued_at < {_GRACE} ORDER BY id
""")  # noqa: S608


async def queued(connection: AsyncConnection) -> list[tuple[UUID, Priority]]:
    """Those runs, oldest first."""
    return _entries(await connection.execute(_QUEUED))


_UNMARK = text("UPDATE runs SET needs_enqueue = false, queued_at = now() WHERE id = ANY(:ids) AND status = 'queued'")


async def unmark(connection: AsyncConnection, run_ids: Sequence[UUID]) -> None:
    """They are in Redis now, and have the same grace as new ones."""
    await connection.execute(_UNMARK, {"ids": list(run_ids)})


def _entries(result: CursorResult[Any]) -> list[tuple[UUID, Priority]]:
    return [(row["id"], Priority(row["priority"])) for row in result.mappings()]
