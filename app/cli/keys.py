"""API keys."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from app.cli.database import in_database
from app.cli.duration import Duration
from app.cli.failure import fail
from app.cli.table import print_table
from app.domain.principal import Scope

if TYPE_CHECKING:
    from app.db.keys import ApiKey


@click.group()
def keys() -> None:
    """API keys."""


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
    key = in_database(
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
    print_table(titles, [_row(key, now) for key in in_database(keys.list_all)])


@keys.command()
@click.argument("key_id", metavar="ID")
def revoke(key_id: str) -> None:
    """Refuse a key from now on."""
    from app.db import keys

    if not in_database(lambda connection: keys.revoke(connection, key_id)):
        fail(f"there is no key {key_id!r} that is not revoked already")
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
