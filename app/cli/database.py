"""Commands that work on the database themselves."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from app.cli.failure import fail

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")


def in_database(statement: "Callable[[AsyncConnection], Awaitable[T]]") -> T:
    """Run one repository function on the database that the settings name."""
    from app.config import DatabaseSettings, load_settings
    from app.db.engine import make_engine

    settings = load_settings(DatabaseSettings)

    async def run() -> T:
        engine = make_engine(settings.database_url.get_secret_value(), pool_size=1, application_name="agent-service")
        try:
            async with engine.connect() as connection:
                return await statement(connection)
        finally:
            await engine.dispose()

    with database_errors():
        return asyncio.run(run())


def in_transaction(statement: "Callable[[AsyncConnection], Awaitable[T]]") -> T:
    """The same for a function of several statements that belong together."""

    async def run(connection: "AsyncConnection") -> T:
        await connection.execution_options(isolation_level="READ COMMITTED")
        async with connection.begin():
            return await statement(connection)

    return in_database(run)


@contextmanager
def database_errors() -> Iterator[None]:
    """A database that is away, locked, empty or closed to its user is one line, not a traceback."""
    import psycopg
    from psycopg.errors import InsufficientPrivilege, UndefinedTable
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except (DBAPIError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        match cause:
            case UndefinedTable():
                fail("the database has no tables yet: run `agent-service migrate`")
            case InsufficientPrivilege():
                rights = "is OWNER_DATABASE_URL set? `agent-service migrate` gives the user of DATABASE_URL its rights"
                fail(f"the database: {_first_line(cause)} ({rights})")
            case psycopg.OperationalError():
                fail(f"the database: {_first_line(cause)}")
        raise


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
