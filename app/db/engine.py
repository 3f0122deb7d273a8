"""The connection pool."""

import select
from collections.abc import Mapping, Sequence
from typing import Any, cast

import psycopg
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine


def driver_url(database_url: str) -> str:
    """The address with psycopg 3 as its driver."""
    return make_url(database_url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def make_engine(
    database_url: str, *, pool_size: int, application_name: str, pool_timeout_s: float = 5.0
) -> AsyncEngine:
    """An engine in autocommit: each statement is a transaction. Where several belong together: `transactional`.

    `pool_timeout_s`: how long a statement waits for a free connection before it fails.
    """
    engine = create_async_engine(
        driver_url(database_url),
        isolation_level="AUTOCOMMIT",
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=pool_timeout_s,
        pool_use_lifo=True,
        skip_autocommit_rollback=True,  # a statement of its own leaves nothing to roll back
        hide_parameters=True,  # what customers wrote stays out of error messages, and so out of logs
        connect_args={
            "application_name": application_name,
            "connect_timeout": 5,
            # Seconds and milliseconds: a host that vanished without a word is noticed.
            "keepalives_idle": 10,
            "tcp_user_timeout": 10_000,
        },
    )
    event.listen(engine.sync_engine, "checkout", _refuse_closed)
    return engine


def _refuse_closed(connection: Any, _record: object, _proxy: object) -> None:
    """Let the pool replace a connection that Postgres has closed while it was idle.

    An idle connection has nothing to read but its end; asking the socket costs microseconds, a ping a round trip.
    """
    poller = select.poll()
    poller.register(connection.driver_connection.fileno(), select.POLLIN)
    if poller.poll(0):
        raise DisconnectionError("closed by Postgres")


def transactional(engine: AsyncEngine) -> AsyncEngine:
    """The same pool, for `begin()`: several statements, one transaction."""
    return engine.execution_options(isolation_level="READ COMMITTED")


_AS_TOOLS = text("SET LOCAL ROLE agent_service_tools")


class ReadOnlyDatabase:
    """What tools get: statements in a read-only transaction, as a role that sees nothing of the service's own tables.

    What tools are to read, a migration grants: `GRANT SELECT ON orders TO agent_service_tools`.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = transactional(engine).execution_options(postgresql_readonly=True)

    async def fetch_all(self, sql: str, parameters: Mapping[str, object]) -> Sequence[Mapping[str, Any]]:
        async with self._engine.begin() as connection:
            pooled = await connection.get_raw_connection()
            # Prepared from the first time on: what is sent without parameters could be several statements otherwise.
            cast("psycopg.AsyncConnection[Any]", pooled.driver_connection).prepare_threshold = 0
            await connection.execute(_AS_TOOLS)
            result = await connection.execute(text(sql), dict(parameters))
            return [dict(row) for row in result.mappings()]
