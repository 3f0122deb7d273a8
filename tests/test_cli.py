"""The command line: what it prints where, and its exit codes."""

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit
from uuid import uuid4

import click.testing
import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

import app.cli
from app import __version__
from app.config import Settings
from app.devstack.access import is_accepted
from app.devstack.ports import free_port
from tests.stack import clean_env

COMMANDS = ["api", "audit", "demo", "dev", "keys", "migrate", "reviews", "worker"]
Result = subprocess.CompletedProcess[str]
Cli = Callable[..., Result]
Keys = Callable[..., click.testing.Result]


def run(*arguments: str, **variables: str) -> Result:
    command = [sys.executable, "-m", "app", *arguments]
    return subprocess.run(command, check=False, env=clean_env(**variables), capture_output=True, text=True, timeout=60)


@pytest.fixture
def keys(database_url: str, redis_url: str) -> Keys:
    """Runs `agent-service keys` in this process, on a migrated database of this test's own."""
    runner = CliRunner(env={"DATABASE_URL": database_url, "REDIS_URL": redis_url})
    return lambda *arguments: runner.invoke(app.cli.cli, ["keys", *arguments], prog_name="agent-service")


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


# -- keys


def test_a_key_is_printed_alone_on_standard_output_and_works(keys: Keys, database_url: str) -> None:
    result = keys("create", "--tenant", "shop", "--name", "till 1")
    assert result.exit_code == 0
    assert re.fullmatch(r"ask_[0-9a-f]{12}_[\w-]{43}\n", result.stdout)
    assert is_accepted(database_url, result.stdout.strip())


def test_the_list_shows_keys_but_no_secret(keys: Keys) -> None:
    first = keys("create", "--tenant", "shop", "--name", "till 1").stdout.strip()
    second = keys("create", "--tenant", "bank", "--name", "desk", "--scope", "admin", "--expires-in", "90d").stdout
    day = datetime.now(UTC) + timedelta(days=90)
    titles, *rows = [re.split(r"  +", line) for line in keys("list").stdout.splitlines()]
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    assert titles == ["ID", "TENANT", "NAME", "SCOPES", "CREATED", "EXPIRES", "STATE"]
    assert rows[0] == [first.split("_")[1], "shop", "till 1", "runs:read,runs:write", today, "never", "valid"]
    assert rows[1][:5] == [second.split("_")[1], "bank", "desk", "admin", today]
    assert rows[1][5].startswith(f"{day:%Y-%m-%d}")
    assert first.split("_", 2)[2] not in keys("list").stdout


def test_a_revoked_key_is_refused_and_cannot_be_revoked_twice(keys: Keys, database_url: str) -> None:
    key = keys("create", "--tenant", "shop", "--name", "till 1").stdout.strip()
    key_id = key.split("_")[1]
    assert keys("revoke", key_id).exit_code == 0
    assert not is_accepted(database_url, key)
    assert keys("list").stdout.splitlines()[1].endswith("revoked")
    again = keys("revoke", key_id)
    assert again.exit_code == 1
    assert again.stderr == f"agent-service: there is no key {key_id!r} that is not revoked already\n"


def test_an_expired_key_is_shown_as_such(keys: Keys, database_url: str) -> None:
    keys("create", "--tenant", "shop", "--name", "till 1", "--expires-in", "30m")
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE api_keys SET expires_at = now()")
    assert keys("list").stdout.splitlines()[1].endswith("expired")


@pytest.mark.parametrize(
    "options",
    [
        ("--name", "till"),
        ("--tenant", "shop"),
        ("--tenant", " ", "--name", "till"),
        ("--tenant", "shop", "--name", "till\n2"),
        ("--tenant", "shop", "--name", "till", "--scope", "runs:delete"),
        *(
            ("--tenant", "shop", "--name", "till", "--expires-in", text)
            for text in ("90", "0d", "-1d", "1w", "1e3d", "")
        ),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(options: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app.cli.cli, ["keys", "create", *options])
    assert result.exit_code == 2
    assert "Error: " in result.stderr


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
