"""The connection pool."""

import asyncio
from collections.abc import Mapping
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.db.engine import ReadOnlyDatabase, make_engine, transactional
from app.db.tables import metadata


def test_a_connection_that_postgres_closed_while_idle_is_replaced(database_url: str) -> None:
    async def scenario() -> None:
        engine = make_engine(database_url, pool_size=1, application_name="idle one")
        try:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
            with psycopg.connect(database_url, autocommit=True) as other:
                other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'idle one'"
                )
            await asyncio.sleep(0.2)
            async with engine.connect() as connection:
                assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1
        finally:
            await engine.dispose()

    asyncio.run(scenario())


def test_a_failed_transaction_leaves_nothing_and_a_single_statement_needs_none(database_url: str) -> None:
    async def scenario() -> list[str]:
        engine = make_engine(database_url, pool_size=2, application_name="test")
        insert = text("INSERT INTO api_keys (id, tenant, name, key_hash, scopes) VALUES (:id, 't', 'n', '', '{}')")
        try:
            with pytest.raises(DBAPIError):
                async with transactional(engine).begin() as connection:
                    await connection.execute(insert, {"id": "rolled back"})
                    await connection.execute(text("SELECT 1 / 0"))
            async with engine.connect() as connection:
                await connection.execute(insert, {"id": "kept"})
            async with engine.connect() as connection:
                return list((await connection.execute(text("SELECT id FROM api_keys"))).scalars())
        finally:
            await engine.dispose()

    assert asyncio.run(scenario()) == ["kept"]


def as_tools(database_url: str, *statements: str) -> list[Mapping[str, Any]]:
    """The rows of the last statement, all on the same connection."""

    async def fetch_all() -> list[Mapping[str, Any]]:
        engine = make_engine(database_url, pool_size=1, application_name="test")
        rows: list[Mapping[str, Any]] = []
        try:
            for statement in statements:
                rows = list(await ReadOnlyDatabase(engine).fetch_all(statement, {}))
        finally:
            await engine.dispose()
        return rows

    return asyncio.run(fetch_all())


def test_tools_read_what_they_were_granted_and_write_nothing(database_url: str, owner_url: str) -> None:
    with psycopg.connect(owner_url, autocommit=True) as owner:
        owner.execute("CREATE TABLE orders AS SELECT 'A-1' AS id")
        owner.execute("GRANT ALL ON orders TO agent_service_tools")
    assert as_tools(database_url, "SELECT id FROM orders") == [{"id": "A-1"}]
    with pytest.raises(DBAPIError, match="read-only transaction"):
        as_tools(database_url, "DELETE FROM orders RETURNING id")


@pytest.mark.parametrize("table", metadata.tables)
def test_tools_see_nothing_of_the_service(database_url: str, owner_url: str, table: str) -> None:
    for url in (database_url, owner_url):
        with pytest.raises(DBAPIError, match="permission denied"):
            as_tools(url, f"SELECT * FROM {table}")


@pytest.mark.parametrize(
    "way_out",
    [
        "SELECT set_config('role', 'none', false)",
        "SELECT set_config('role', 'none', true)",
        "SELECT 1 WHERE set_config('role', 'agent_service', false) = ''",
    ],
)
def test_tools_do_not_get_out_of_their_role(database_url: str, way_out: str) -> None:
    with pytest.raises(DBAPIError, match="permission denied"):
        as_tools(database_url, way_out, "SELECT * FROM api_keys")


@pytest.mark.parametrize("more", ["RESET ROLE; SELECT * FROM api_keys", "SELECT 1; COMMIT; DELETE FROM runs"])
def test_a_tools_statement_is_one_statement(database_url: str, more: str) -> None:
    with pytest.raises(DBAPIError, match="multiple commands"):
        as_tools(database_url, more)


def test_an_error_does_not_hold_what_the_statement_was_given(database_url: str) -> None:
    async def fail() -> None:
        engine = make_engine(database_url, pool_size=1, application_name="test")
        try:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1 / 0 WHERE 'x' <> :secret"), {"secret": "a customer's words"})
        finally:
            await engine.dispose()

    with pytest.raises(DBAPIError) as caught:
        asyncio.run(fail())
    assert "a customer's words" not in str(caught.value)
