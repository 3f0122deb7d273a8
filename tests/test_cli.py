"""The command line: what it prints where, and its exit codes."""

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from app import __version__
from app.config import Settings
from app.devstack.ports import free_port
from tests.stack import clean_env

COMMANDS = ["api", "audit", "budgets", "demo", "dev", "keys", "migrate", "reviews", "worker"]
Result = subprocess.CompletedProcess[str]
Cli = Callable[..., Result]


def run(*arguments: str, **variables: str) -> Result:
    command = [sys.executable, "-m", "app", *arguments]
    return subprocess.run(command, check=False, env=clean_env(**variables), capture_output=True, text=True, timeout=60)


@pytest.fixture
def cli(database_url: str, redis_url: str) -> Cli:
    """Runs a command on a migrated database of this test's own."""

    def on_database(*arguments: str, **variables: str) -> Result:
        return run(*arguments, **{"DATABASE_URL": database_url, "REDIS_URL": redis_url, **variables})

    return on_database


# -- starting


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert re.findall(r"^  (\w+)  ", result.stdout, re.MULTILINE) == COMMANDS


def test_help_loads_nothing_that_a_command_needs() -> None:
    loaded = "import sys, app.cli; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert not {"sqlalchemy", "fastapi", "uvicorn", "redis", "pydantic", "psycopg"} & set(eval(result.stdout))


def test_the_version() -> None:
    assert run("--version").stdout == f"agent-service, version {__version__}\n"


@pytest.mark.parametrize("command", [("api",), ("worker",), ("migrate",), ("keys", "list")])
def test_a_missing_variable_is_one_line_and_exit_code_2(command: tuple[str, ...]) -> None:
    result = run(*command, REDIS_URL="redis://127.0.0.1:1")
    assert result.returncode == 2
    assert re.fullmatch(r"agent-service: DATABASE_URL is missing: [^\n]+\n", result.stderr)
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["api", "worker"])
def test_agents_that_cannot_be_loaded_stop_the_start(cli: Cli, command: str) -> None:
    result = cli(command, AGENTS="app.agents,no.such.agents", OPENAI_API_KEY="none")
    assert result.returncode == 2
    assert result.stderr.startswith("agent-service: AGENTS: cannot import no.such.agents: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("migrate",), ("keys", "list"), ("keys", "revoke", "abc")])
def test_a_database_that_is_away_is_one_line_and_exit_code_1(command: tuple[str, ...]) -> None:
    url = f"postgresql://agent:hunter2@127.0.0.1:{free_port()}/agents"
    result = run(*command, DATABASE_URL=url, REDIS_URL="redis://127.0.0.1:1")
    assert result.returncode == 1
    assert re.fullmatch(r"agent-service: the database: [^\n]*Connection refused[^\n]*\n", result.stderr)
    assert "hunter2" not in result.stderr


def test_a_database_without_tables_says_what_to_do(cli: Cli, owner_url: str) -> None:
    with psycopg.connect(owner_url) as connection:
        connection.execute("DROP TABLE api_keys")
    result = cli("keys", "list")
    assert (result.returncode, result.stderr) == (
        1,
        "agent-service: the database has no tables yet: run `agent-service migrate`\n",
    )


def test_a_user_without_the_rights_of_the_service_is_told_who_gives_them(cli: Cli, owner_url: str) -> None:
    user = f"stranger_{uuid4().hex[:12]}"
    with psycopg.connect(owner_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(sql.Identifier(user)))
        try:
            address = urlsplit(owner_url)
            theirs = address._replace(netloc=f"{user}:x@{address.hostname}:{address.port}").geturl()
            refused = cli("keys", "list", DATABASE_URL=theirs)
            assert refused.returncode == 1
            assert refused.stderr == (
                "agent-service: the database: permission denied for table api_keys (is OWNER_DATABASE_URL set?"
                " `agent-service migrate` gives the user of DATABASE_URL its rights)\n"
            )
            assert cli("migrate", DATABASE_URL=theirs, OWNER_DATABASE_URL=owner_url).returncode == 0
            assert cli("keys", "list", DATABASE_URL=theirs).returncode == 0
        finally:
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(user)))


def test_migrate_as_the_owner_says_that_it_is_done(cli: Cli, owner_url: str) -> None:
    result = cli("migrate", OWNER_DATABASE_URL=owner_url)
    assert (result.returncode, result.stderr) == (0, "The database is up to date.\n")


def test_a_taken_port_is_one_line_that_names_it_and_an_end(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        env = clean_env(
            DATABASE_URL=settings.database_url.get_secret_value(),
            REDIS_URL=settings.redis_url.get_secret_value(),
            API_PORT=str(port),
            WORKER_HEALTH_PORT=str(port),
            OPENAI_API_KEY="unused",
        )
        for command, variable in (("api", "API_PORT"), ("worker", "WORKER_HEALTH_PORT")):
            result = subprocess.run(
                [sys.executable, "-m", "app", command], env=env, capture_output=True, text=True, timeout=20, check=False
            )
            assert result.returncode == 2, result.stderr
            [line] = [line for line in result.stderr.splitlines() if line.startswith("agent-service: ")]
            assert variable in line
            assert str(port) in line
