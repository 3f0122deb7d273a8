"""API keys."""

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from app.cli.database import in_database
from app.cli.duration import Duration
from app.cli.failure import fail
from app.cli.table import print_table
from app.domain.principal import KeyLimits, Scope

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from app.db.keys import ApiKey

MAX_RATE = 10_000.0
MIN_RATE = 0.01
MAX_BURST = 100_000
MAX_IN_FLIGHT = 1_000_000

_DEFAULTS = KeyLimits()
_ONCE = "Keep it now: only a hash is stored, it cannot be shown again."

Command = TypeVar("Command", bound=Callable[..., None])


class _Rate(click.FloatRange):
    """Also refuses what is not a number: it is not below any bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        rate = float(super().convert(value, param, ctx))
        if math.isnan(rate):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return rate


class _Overlap(Duration):
    """A duration, or none at all."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if value == "0s":
            return timedelta(0)
        return super().convert(value, param, ctx)


def _limit_options(*, defaults: KeyLimits | None) -> Callable[[Command], Command]:
    """The options that say how much a key's holder may ask for. Without defaults, what is not given is None."""

    def decorate(command: Command) -> Command:
        for name, kind, default, text in (
            ("--max-in-flight", click.IntRange(1, MAX_IN_FLIGHT), "max_in_flight", "Runs that are queued or running."),
            ("--burst", click.IntRange(1, MAX_BURST), "burst", "Requests at once, after a pause."),
            ("--rate", _Rate(MIN_RATE, MAX_RATE), "requests_per_s", "Requests per second, on average."),
        ):
            value = getattr(defaults, default) if defaults else None
            option = click.option(name, default, type=kind, default=value, show_default=bool(defaults), help=text)
            command = option(command)
        return command

    return decorate


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
@_limit_options(defaults=_DEFAULTS)
def create(
    *,
    tenant: str,
    name: str,
    scopes: tuple[str, ...],
    expires_in: timedelta | None,
    requests_per_s: float,
    burst: int,
    max_in_flight: int,
) -> None:
    """Make a key and print it, this once."""
    from app.db import keys

    for option, value in (("--tenant", tenant), ("--name", name)):
        if not value.strip() or not value.isprintable():
            raise click.BadParameter("must be a word or more of printable text", param_hint=option)
    granted = frozenset(Scope(scope) for scope in scopes)
    limits = KeyLimits(requests_per_s=requests_per_s, burst=burst, max_in_flight=max_in_flight)
    key = in_database(
        lambda connection: keys.create(
            connection, tenant=tenant, name=name, scopes=granted, expires_at=_moment(expires_in), limits=limits
        )
    )
    click.echo(_ONCE, err=True)
    click.echo(key)


@keys.command(name="list")
def list_keys() -> None:
    """All keys, the oldest first; never the secrets.

    LIMITS: requests per second, at once, and runs in flight.
    """
    from app.db import keys

    now = datetime.now(UTC)
    titles = ("ID", "TENANT", "NAME", "SCOPES", "LIMITS", "CREATED", "LAST USED", "STATE")
    print_table(titles, [_row(key, now) for key in in_database(keys.list_all)])


@keys.command()
@click.argument("key_id", metavar="ID")
@click.option(
    "--overlap",
    type=_Overlap(),
    default="24h",
    show_default=True,
    help="How long the old key is good for still, at most: 30m, 12h, 2d; 0s: not at all.",
)
@click.option("--expires-in", type=Duration(), help="Of the new key; without it, when the old one would have expired.")
def rotate(key_id: str, overlap: timedelta, expires_in: timedelta | None) -> None:
    """Make a key that takes another's place, and print it, this once.

    It is for the same tenant, with the same name, scopes and limits, and in the same hands: both share one rate and one
    number of runs in flight, and where four eyes are demanded they are two of the same.
    """
    from app.db import keys

    async def replace(connection: "AsyncConnection") -> "tuple[str | None, ApiKey | None]":
        new = await keys.rotate(connection, key_id, overlap=overlap, expires_at=_moment(expires_in))
        return new, await keys.get(connection, key_id)

    new, old = in_database(replace)
    if new is None or old is None:
        fail(_why_not_rotated(key_id, old))
    until = f"is good until {_minute(old.expires_at)}" if overlap and old.expires_at else "is refused from now on"
    click.echo(f"Key {key_id} {until}.", err=True)
    click.echo(_ONCE, err=True)
    click.echo(new)


@keys.command()
@click.argument("key_id", metavar="ID")
def revoke(key_id: str) -> None:
    """Refuse a key from now on."""
    from app.db import keys

    if not in_database(lambda connection: keys.revoke(connection, key_id)):
        fail(f"there is no key {key_id!r} that is not revoked already")
    click.echo(f"Key {key_id} is revoked.", err=True)


@keys.command()
@click.argument("key_id", metavar="ID")
@_limit_options(defaults=None)
def limit(*, key_id: str, requests_per_s: float | None, burst: int | None, max_in_flight: int | None) -> None:
    """Change how much a key's holder may ask for, from now on; what is not given stays."""
    from app.db import keys

    if requests_per_s is None and burst is None and max_in_flight is None:
        raise click.UsageError("give at least one of --rate, --burst and --max-in-flight")
    changed = in_database(
        lambda connection: keys.limit(
            connection, key_id, requests_per_s=requests_per_s, burst=burst, max_in_flight=max_in_flight
        )
    )
    if not changed:
        fail(f"there is no valid key {key_id!r}")
    click.echo(f"Changed for {' and '.join(changed)}.", err=True)


def _moment(length: timedelta | None) -> datetime | None:
    return datetime.now(UTC) + length if length else None


def _why_not_rotated(key_id: str, key: "ApiKey | None") -> str:
    if key is None:
        return f"there is no key {key_id!r}"
    if key.revoked_at:
        return f"key {key_id} was revoked: make a new one with `agent-service keys create`"
    if key.replaced_by:
        return f"key {key_id} was replaced before: rotate {key.replaced_by}"
    return f"key {key_id} has expired: make a new one with `agent-service keys create`"


def _row(key: "ApiKey", now: datetime) -> tuple[str, ...]:
    limits = f"{key.limits.requests_per_s:g}/s {key.limits.burst} {key.limits.max_in_flight}"
    created = f"{key.created_at.astimezone(UTC):%Y-%m-%d}"
    used = _minute(key.last_used_at) if key.last_used_at else "never"
    scopes = ",".join(sorted(key.scopes))
    return key.id, key.tenant, key.name, scopes, limits, created, used, _state(key, now)


def _state(key: "ApiKey", now: datetime) -> str:
    if key.revoked_at:
        return "revoked"
    if key.expires_at is None:
        return "valid"
    if key.expires_at <= now:
        return "replaced" if key.replaced_by else "expired"
    return f"{'replaced, good' if key.replaced_by else 'valid'} until {_minute(key.expires_at)}"


def _minute(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%MZ}"
