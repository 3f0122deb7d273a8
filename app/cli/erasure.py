"""`agent-service audit erase` and `retain`: what people and models wrote goes, the events stay."""

import asyncio
import getpass
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

import click

from app.cli.database import database_errors
from app.cli.duration import Duration
from app.domain.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from app.db.erasure import Erased

T = TypeVar("T")
BATCH = 500


def operator() -> str:
    """How the audit names who gives a command here."""
    try:
        return f"operator:{getpass.getuser()}"
    except (KeyError, OSError):  # a container's user need not have a name
        return "operator:unknown"


@click.command()
@click.option(
    "--run", "run_ids", type=click.UUID, multiple=True, metavar="ID", help="This run; several times for more."
)
@click.option("--tenant", help="Whose subject it is.")
@click.option("--subject", metavar="KEY=VALUE", help="All runs of the tenant that have this in their metadata.")
@click.option("--reason", required=True, help="Why; it is recorded for ever, so write nothing personal into it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Say what would be erased, and erase nothing.")
def erase(
    *, run_ids: Sequence[UUID], tenant: str | None, subject: str | None, reason: str, yes: bool, dry_run: bool
) -> None:
    """Erase what people and models wrote in runs that have ended. Nothing brings it back; the audit still holds.

    Runs that have not ended are named and left alone; then the exit code is 1.
    """
    from app.db import erasure
    from app.db.erasure import Erased

    key, is_pair, value = (subject or "").partition("=")
    if bool(run_ids) == bool(subject) or bool(subject) != bool(tenant) or (subject and not (key and is_pair)):
        raise click.UsageError("give --run, or --tenant with --subject KEY=VALUE")

    async def plan(engine: "AsyncEngine") -> dict[UUID, Erased]:
        async with engine.connect() as connection:
            if tenant:
                return await erasure.foresee(connection, await erasure.runs_of_subject(connection, tenant, key, value))
            return await erasure.foresee(connection, sorted(run_ids))

    planned = _as_owner(plan)
    due = [run_id for run_id, what in planned.items() if what is Erased.NOW]
    if dry_run:
        _tell(planned, "would be erased")
    else:
        if due and not yes:
            click.confirm(f"Erase {len(due)} runs for good?", abort=True, err=True)

        async def work(engine: "AsyncEngine") -> dict[UUID, Erased]:
            erased = await _erase(engine, due, reason)
            await _forget(engine)
            return erased

        _tell({**planned, **_as_owner(work)} if due else planned, "erased")
    sys.exit(any(what in (Erased.ACTIVE, Erased.UNKNOWN) for what in planned.values()))


@click.command()
@click.option("--older-than", type=Duration(), required=True, help="Since the end of the run: 365d.")
@click.option("--tenant", help="Runs of this tenant only.")
@click.option("--dry-run", is_flag=True, help="Say how many runs would be erased, and erase nothing.")
def retain(*, older_than: timedelta, tenant: str | None, dry_run: bool) -> None:
    """Erase all runs that ended longer ago than that. For a scheduler: run it daily."""
    from app.db import erasure

    seconds = older_than.total_seconds()
    why = f"retention: it ended more than {older_than} ago"

    async def work(engine: "AsyncEngine") -> int:
        count, after = 0, None
        while True:
            async with engine.connect() as connection:
                old = await erasure.ended_before(connection, seconds=seconds, tenant=tenant, after=after, limit=BATCH)
            if not old:
                break
            after = old[-1]
            count += len(old)
            if not dry_run:
                await _erase(engine, old, why)
        if count and not dry_run:
            await _forget(engine)
        return count

    count = _as_owner(work)
    click.echo(f"{count:,} runs {'would be ' if dry_run else ''}erased.", err=True)


async def _erase(engine: "AsyncEngine", run_ids: Sequence[UUID], why: str) -> "dict[UUID, Erased]":
    from app.db import erasure

    return {run_id: await erasure.erase(engine, run_id, why=why, actor=operator()) for run_id in run_ids}


async def _forget(engine: "AsyncEngine") -> None:
    from app.db import erasure

    async with engine.connect() as connection:
        await erasure.forget(connection)


def _tell(runs: "dict[UUID, Erased]", done: str) -> None:
    """One line for each run that was asked for."""
    from app.db.erasure import Erased

    words = {
        Erased.NOW: done,
        Erased.BEFORE: "erased before",
        Erased.ACTIVE: "has not ended, nothing of it is erased",
        Erased.UNKNOWN: "no such run",
    }
    for run_id, what in runs.items():
        click.echo(f"{run_id}  {words[what]}")
    if not runs:
        click.echo("No run matches.", err=True)


def _as_owner(work: "Callable[[AsyncEngine], Awaitable[T]]") -> T:
    """Do it as the owner of the tables. Raises `ConfigurationError` where the settings do not name one."""
    from app.config import DatabaseSettings, load_settings
    from app.db import erasure
    from app.db.engine import make_engine

    settings = load_settings(DatabaseSettings)

    async def run() -> T:
        engine = make_engine(settings.owner_url, pool_size=1, application_name="agent-service erasure")
        try:
            async with engine.connect() as connection:
                if not await erasure.may_erase(connection):
                    raise ConfigurationError("OWNER_DATABASE_URL: only the owner of the tables can erase")
            return await work(engine)
        finally:
            await engine.dispose()

    with database_errors():
        return asyncio.run(run())
