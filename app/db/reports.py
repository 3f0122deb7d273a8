"""Runs that ended outside of a worker, until one has told of them: their metrics and the end of their traces."""

from collections.abc import Sequence

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.fetch import fetch
from app.db.runs import COLUMNS, run_of
from app.domain.run import Run

_TAKE = text(f"""
    UPDATE runs SET unreported = false
    WHERE id IN (SELECT id FROM runs WHERE unreported ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED)
    RETURNING {COLUMNS}
""")  # noqa: S608 - the columns are a constant


async def take_unreported(connection: AsyncConnection, *, limit: int) -> Sequence[Run]:
    """Up to `limit` of them, each given to one caller only, who tells of them if it lives that long."""
    return [run_of(row) for row in await fetch(connection, _TAKE, {"limit": limit})]
