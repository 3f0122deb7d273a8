"""Runs a statement on psycopg itself, within SQLAlchemy's pool, transactions and errors.

SQLAlchemy's own execution takes about three times the CPU of the driver's: it adapts the cursor, and builds the result
metadata of a textual statement each time anew. What requests and runs do most, they do through here.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import psycopg
from psycopg.rows import dict_row
from sqlalchemy import TextClause
from sqlalchemy.dialects.postgresql.psycopg import PGDialectAsync_psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

_DIALECT = PGDialectAsync_psycopg()  # type: ignore[no-untyped-call]

Row = dict[str, Any]


async def fetch(connection: AsyncConnection, statement: TextClause, parameters: Mapping[str, object]) -> list[Row]:
    """All rows. `None` among the parameters needs a cast in the statement where Postgres cannot tell its type.

    Raises `sqlalchemy.exc.DBAPIError`, as the connection itself would.
    """
    pooled = await connection.get_raw_connection()
    driver = pooled.driver_connection
    assert isinstance(driver, psycopg.AsyncConnection)
    try:
        async with driver.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(_compiled(statement), parameters)
            return await cursor.fetchall()
    except psycopg.Error as error:
        lost = driver.closed
        if lost:
            await connection.invalidate()
        raise DBAPIError.instance(
            None, None, error, psycopg.Error, hide_parameters=True, connection_invalidated=lost, dialect=_DIALECT
        ) from error
    except BaseException:  # interrupted in the middle: nobody knows what is still to come on this connection
        await connection.invalidate()
        raise


async def fetch_one(connection: AsyncConnection, statement: TextClause, parameters: Mapping[str, object]) -> Row | None:
    """The only row, or None."""
    rows = await fetch(connection, statement, parameters)
    assert len(rows) <= 1
    return rows[0] if rows else None


@cache  # statements are constants of their modules, so there are as many as somebody wrote
def _compiled(statement: TextClause) -> bytes:
    return str(statement.compile(dialect=_DIALECT)).encode()
