"""The same proxy in front of Postgres."""

import asyncio
import time
from collections.abc import Iterator

import psycopg
import pytest

from tests.faults.proxy import Proxy
from tests.faults.wire import PostgresWire
from tests.stack import Stack

INSERT = """
    INSERT INTO notes
    VALUES (%s)
"""


@pytest.fixture(params=[65536, 3], ids=["whole", "in pieces"])
def chunk_bytes(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture
def postgres_proxy(servers: Stack, chunk_bytes: int) -> Iterator[Proxy]:
    with Proxy(servers.postgres.port, wire=PostgresWire, chunk_bytes=chunk_bytes) as proxy:
        yield proxy


@pytest.fixture
def notes_url(servers: Stack, postgres_proxy: Proxy, owner_url: str) -> str:
    """By way of the proxy to a database with a table of notes."""
    with psycopg.connect(owner_url) as connection:
        connection.execute("CREATE TABLE notes (body text)")
    return owner_url.replace(f":{servers.postgres.port}/", f":{postgres_proxy.port}/")


def notes(owner_url: str) -> list[str]:
    with psycopg.connect(owner_url) as connection:
        return [body for (body,) in connection.execute("SELECT body FROM notes ORDER BY body")]


def test_a_commit_whose_reply_is_swallowed_is_committed(notes_url: str, postgres_proxy: Proxy) -> None:
    with psycopg.connect(notes_url) as connection:
        swallowed = postgres_proxy.swallow("COMMIT")
        connection.execute(INSERT, ["kept"])
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
        swallowed.wait(1)
        assert notes(notes_url) == ["kept"]


@pytest.mark.parametrize("executed_before", [0, 5, 10], ids=["plain", "about to be prepared", "prepared"])
def test_a_statement_chosen_by_its_text_is_executed_and_its_reply_swallowed(
    notes_url: str, postgres_proxy: Proxy, executed_before: int
) -> None:
    async def scenario() -> None:
        async with await psycopg.AsyncConnection.connect(notes_url, autocommit=True) as connection:
            for number in range(executed_before):
                await connection.execute(INSERT, [f"before {number}"])
            swallowed = postgres_proxy.swallow("INSERT INTO notes\n    VALUES")
            for _ in range(10):
                await connection.execute("SELECT body FROM notes WHERE body = %s", ["INSERT INTO notes"])
            with pytest.raises(psycopg.OperationalError):
                await connection.execute(INSERT, ["kept"])
            swallowed.wait(1)

    asyncio.run(scenario())
    assert notes(notes_url) == [*(f"before {number}" for number in range(executed_before)), "kept"]


@pytest.mark.parametrize("chunk_bytes", [65536, 999])
def test_many_rows_of_many_statements_in_one_message_pass_and_are_swallowed(
    notes_url: str, postgres_proxy: Proxy
) -> None:
    with psycopg.connect(notes_url, autocommit=True) as connection:
        with connection.cursor() as cursor, connection.pipeline():
            cursor.executemany(INSERT, [[f"{number:03}"] for number in range(100)])
        swallowed = postgres_proxy.swallow("DELETE FROM notes")
        assert len(connection.execute("SELECT repeat(body, 1000) FROM notes").fetchall()) == 100
        with pytest.raises(psycopg.OperationalError):
            connection.execute("DELETE FROM notes RETURNING repeat(body, 1000)")
        swallowed.wait(1)
    assert notes(notes_url) == []


def test_in_silence_postgres_keeps_the_connection(notes_url: str, owner_url: str, postgres_proxy: Proxy) -> None:
    ours = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'silent'"
    with (
        psycopg.connect(owner_url, autocommit=True) as postgres,
        psycopg.connect(notes_url, application_name="silent", autocommit=True) as connection,
    ):
        with postgres_proxy.silent():
            connection.pgconn.send_query(b"INSERT INTO notes VALUES ('silent')")
            connection.close()
            time.sleep(0.2)
            assert postgres.execute(ours).fetchone() == (1,)
        Stack.until(lambda: postgres.execute(ours).fetchone() == (0,))
    assert notes(owner_url) == []
