"""The connection pool."""

import asyncio
from collections.abc import Mapping
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.db.engine import ReadOnlyDatabase, make_engine, transactional


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


def test_tools_can_read_and_not_write(database_url: str) -> None:
    async def fetch(sql: str) -> list[Mapping[str, Any]]:
        engine = make_engine(database_url, pool_size=1, application_name="test")
        try:
            return list(await ReadOnlyDatabase(engine).fetch_all(sql, {"id": "x"}))
        finally:
            await engine.dispose()

    assert asyncio.run(fetch("SELECT CAST(:id AS text) AS id")) == [{"id": "x"}]
    with pytest.raises(DBAPIError, match="read-only transaction"):
        asyncio.run(fetch("DELETE FROM api_keys WHERE id = :id RETURNING id"))


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
