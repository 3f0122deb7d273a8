"""The command line: `agent-service`.

Exit codes: 0 done, 1 it did not work, 2 wrong usage or a wrong setting. Commands import what they need when they run.
"""

import asyncio
import os
import re
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click

from app import __version__
from app.domain.errors import ConfigurationError
from app.domain.principal import Scope

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from app.db.keys import ApiKey

T = TypeVar("T")


def main() -> None:
    """Entry point of `agent-service`."""
    try:
        cli(prog_name="agent-service")
    except ConfigurationError as error:
        click.echo(f"agent-service: {error}", err=True)
        sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Run model-and-tool agents: an API that takes runs, workers that execute them."""


@cli.command()
def dev() -> None:
    """The whole stack on this machine until Ctrl-C, with auto-reload; its data is kept in .dev/."""
    from app.devstack.dev import dev

    with _stack_errors():
        dev()


@cli.command()
def demo() -> None:
    """One run from beginning to end on a stack of its own, step by step; then stop everything."""
    from app.devstack.demo import demo

    with _stack_errors():
        succeeded = demo()
    sys.exit(not succeeded)


@cli.command()
def migrate() -> None:
    """Bring the database's schema up to date."""
    from app.config import DatabaseSettings, load_settings
    from app.db.migrate import upgrade

    settings = load_settings(DatabaseSettings)
    with _database_errors():
        upgrade(settings.database_url.get_secret_value())
    click.echo("The database is up to date.", err=True)


@cli.command()
def api() -> None:
    """Serve the HTTP API."""
    from app.startup import loading

    with loading():
        from app.config import load_settings
        from app.logging import configure_logging

        settings = load_settings()
        configure_logging(settings.log_level)

        import uvicorn

        from app.api.protocol import ProblemProtocol
        from app.main import create_app

        config = uvicorn.Config(
            create_app(settings),
            host=settings.api_host,
            port=settings.api_port,
            loop="uvloop",
            http=ProblemProtocol,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,  # longer than clients and load balancers keep an idle connection: they close it
            timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
        )
        config.load()
    try:
        listener = socket.create_server(
            (settings.api_host, settings.api_port),
            family=socket.AF_INET6 if ":" in settings.api_host else socket.AF_INET,
            backlog=config.backlog,
        )
    except OSError as error:
        where = f"{settings.api_host}:{settings.api_port}"
        raise ConfigurationError(f"API_HOST, API_PORT: cannot listen on {where}: {error.strerror}") from error
    uvicorn.Server(config).run(sockets=[listener])


@cli.command()
def worker() -> None:
    """Execute runs."""
    # The API's side of the service must not import the worker's, so this process becomes one.
    os.execv(sys.executable, [sys.executable, "-m", "worker"])  # noqa: S606 - no shell, nothing from outside


@cli.group()
def keys() -> None:
    """API keys."""


class Duration(click.ParamType[timedelta]):
    """A positive number and a unit: minutes, hours or days."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        match = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration like 30m, 12h or 90d.", param, ctx)
        return timedelta(**{{"m": "minutes", "h": "hours", "d": "days"}[match[2]]: int(match[1])})


@keys.command()
@click.option("--tenant", required=True, help="Whose runs the key sees and makes.")
@click.option("--name", required=True, help="What the key is for, to recognise it in the list.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    default=[Scope.RUNS_READ.value, Scope.RUNS_WRITE.value],
    show_default=True,
    help="What the key may do; give it several times.",
)
@click.option("--expires-in", type=Duration(), help="30m, 12h, 90d; without it the key is good until it is revoked.")
def create(tenant: str, name: str, scopes: tuple[str, ...], expires_in: timedelta | None) -> None:
    """Make a key and print it, this once."""
    from app.db import keys

    for option, value in (("--tenant", tenant), ("--name", name)):
        if not value.strip() or not value.isprintable():
            raise click.BadParameter("must be a word or more of printable text", param_hint=option)
    expires_at = datetime.now(UTC) + expires_in if expires_in else None
    granted = frozenset(Scope(scope) for scope in scopes)
    key = _in_database(
        lambda connection: keys.create(connection, tenant=tenant, name=name, scopes=granted, expires_at=expires_at)
    )
    click.echo("Keep it now: only a hash is stored, it cannot be shown again.", err=True)
    click.echo(key)


@keys.command(name="list")
def list_keys() -> None:
    """All keys, the oldest first; never the secrets."""
    from app.db import keys

    now = datetime.now(UTC)
    titles = ("ID", "TENANT", "NAME", "SCOPES", "CREATED", "EXPIRES", "STATE")
    rows = [titles, *(_row(key, now) for key in _in_database(keys.list_all))]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@keys.command()
@click.argument("key_id", metavar="ID")
def revoke(key_id: str) -> None:
    """Refuse a key from now on."""
    from app.db import keys

    if not _in_database(lambda connection: keys.revoke(connection, key_id)):
        _fail(f"there is no key {key_id!r} that is not revoked already")
    click.echo(f"Key {key_id} is revoked.", err=True)


def _row(key: "ApiKey", now: datetime) -> tuple[str, ...]:
    state = "valid"
    if key.expires_at and key.expires_at <= now:
        state = "expired"
    if key.revoked_at:
        state = "revoked"
    created = f"{key.created_at.astimezone(UTC):%Y-%m-%d}"
    expires = f"{key.expires_at.astimezone(UTC):%Y-%m-%d %H:%MZ}" if key.expires_at else "never"
    return key.id, key.tenant, key.name, ",".join(sorted(key.scopes)), created, expires, state


def _in_database(statement: "Callable[[AsyncConnection], Awaitable[T]]") -> T:
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

    with _database_errors():
        return asyncio.run(run())


@contextmanager
def _database_errors() -> Iterator[None]:
    """A database that is away, locked or empty is one line, not a traceback."""
    from psycopg.errors import UndefinedTable
    from sqlalchemy.exc import OperationalError, ProgrammingError

    try:
        yield
    except OperationalError as error:
        _fail(f"the database: {str(error.orig).strip().splitlines()[0]}")
    except ProgrammingError as error:
        if not isinstance(error.orig, UndefinedTable):
            raise
        _fail("the database has no tables yet: run `agent-service migrate`")


@contextmanager
def _stack_errors() -> Iterator[None]:
    """A part that did not start or broke down is told with the end of its output, not with a traceback of ours."""
    from app.devstack.processes import ProcessFailed

    try:
        yield
    except ProcessFailed as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    click.echo(f"agent-service: {message}", err=True)
    sys.exit(1)
