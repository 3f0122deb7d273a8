"""The servers that development and tests run on: what becomes of them and their data when something goes wrong."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from app.devstack.ports import free_port, is_free
from app.devstack.processes import ProcessFailed, Reaper
from app.devstack.servers import Postgres, Valkey
from app.devstack.unprivileged import SYSTEM_USER
from tests.stack import new_directory


@pytest.fixture(scope="module")
def server(reaper: Reaper) -> Iterator[Postgres]:
    with new_directory() as directory:
        server = Postgres(directory / "postgres", reaper=reaper, durable=False)
        yield server
        server.stop()


@pytest.fixture
def postgres(server: Postgres) -> Postgres:
    """Runs, and holds nothing."""
    if not server.is_running:
        server.start()
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS kept")
    return server


@pytest.fixture
def valkey(directory: Path, reaper: Reaper) -> Iterator[Valkey]:
    server = Valkey(directory / "valkey", reaper=reaper)
    server.start()
    yield server
    server.stop()


def write(postgres: Postgres) -> None:
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS value")


def read(postgres: Postgres) -> object:
    with psycopg.connect(postgres.url()) as connection:
        return connection.execute("SELECT value FROM kept").fetchone()


def test_postgres_is_18_on_loopback_only_with_a_password(postgres: Postgres) -> None:
    with psycopg.connect(postgres.url()) as connection:
        assert connection.info.server_version // 10_000 == 18
        assert connection.execute("SHOW listen_addresses").fetchone() == ("127.0.0.1",)
        assert connection.execute("SHOW default_text_search_config").fetchone() == ("pg_catalog.english",)
    password = postgres.directory / "password"
    assert password.stat().st_mode & 0o777 == 0o600
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(f"postgresql://postgres@127.0.0.1:{postgres.port}/postgres")


def test_postgres_runs_as_a_user_of_its_own_where_we_are_root(postgres: Postgres) -> None:
    owner = psutil.Process(postgres.pid).username()
    assert owner == (SYSTEM_USER if os.geteuid() == 0 else psutil.Process().username())


def test_postgres_keeps_its_data_and_its_address_over_a_restart(postgres: Postgres) -> None:
    write(postgres)
    url = postgres.url()
    postgres.restart()
    assert (read(postgres), postgres.url()) == ((1,), url)


@pytest.mark.parametrize("how", ["killed", "stopped at once", "frozen and killed"])
def test_postgres_comes_back_on_the_same_port_after_it_was(postgres: Postgres, how: str) -> None:
    write(postgres)
    if how == "stopped at once":
        postgres.stop(signal.SIGQUIT)
    else:
        if how == "frozen and killed":
            postgres.pause()
        postgres.kill()
    postgres.start()
    assert read(postgres) == (1,)


def test_postgres_comes_back_while_queries_of_the_killed_one_still_run(postgres: Postgres) -> None:
    running = threading.Event()

    def compute() -> None:
        with suppress(psycopg.OperationalError), psycopg.connect(postgres.url()) as connection:
            running.set()
            connection.execute("SELECT count(*) FROM generate_series(1, 1000000000)")

    write(postgres)
    thread = threading.Thread(target=compute)
    thread.start()
    running.wait()
    postgres.kill()
    postgres.start()
    thread.join()
    assert read(postgres) == (1,)


def test_a_postmaster_that_nobody_stopped_is_replaced(directory: Path) -> None:
    with Reaper() as reaper:
        forgotten = Postgres(directory / "postgres", reaper=reaper, durable=False)
        forgotten.start()
        write(forgotten)
        successor = Postgres(directory / "postgres", reaper=reaper, durable=False)
        successor.start()
        assert forgotten.wait(1) == 0
        assert read(successor) == (1,)
        successor.stop()


def test_a_lock_file_with_the_pid_of_a_stranger_does_not_keep_postgres_away(
    postgres: Postgres, directory: Path
) -> None:
    postgres.stop()
    (postgres.directory / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n/elsewhere\n")
    postgres.start()
    assert postgres.is_running


def test_valkey_never_evicts_and_keeps_what_is_written(valkey: Valkey) -> None:
    with redis.Redis.from_url(valkey.url()) as client:
        client.set("kept", 1)
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("bind") == {"bind": "127.0.0.1"}
    valkey.restart()
    valkey.kill()
    valkey.start()
    with redis.Redis.from_url(valkey.url()) as client:
        assert client.get("kept") == b"1"


def test_a_frozen_server_answers_again_when_it_is_resumed(valkey: Valkey) -> None:
    with redis.Redis.from_url(valkey.url(), socket_timeout=0.2, retry=None) as client:
        valkey.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        valkey.resume()
        assert client.ping()


def test_a_server_that_does_not_start_says_why(directory: Path, reaper: Reaper, valkey: Valkey) -> None:
    for server in (
        Postgres(directory / "other", reaper=reaper, port=valkey.port, durable=False),
        Valkey(directory / "another", reaper=reaper, port=valkey.port),
    ):
        with pytest.raises(
            ProcessFailed, match=rf"^{server.name} ended with exit code 1 (.|\n)*Address already in use"
        ):
            server.start()
        assert not server.is_running


def test_free_ports_are_not_those_of_outgoing_connections() -> None:
    port = free_port()
    assert port < 32_000
    assert is_free(port)
