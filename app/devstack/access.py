"""API keys for the development stack, the demo and the tests."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import keys
from app.db.engine import make_engine
from app.domain.principal import KeyLimits, Scope

UNHURRIED = KeyLimits(requests_per_s=10_000, burst=100_000, max_in_flight=1_000_000)


def make_key(
    database_url: str, *, tenant: str, name: str, scopes: Iterable[Scope] = tuple(Scope), limits: KeyLimits = UNHURRIED
) -> str:
    """A new key; for everything, and as often as anybody could want, by default."""

    async def make() -> str:
        async with _connection(database_url) as connection:
            return await keys.create(
                connection, tenant=tenant, name=name, scopes=frozenset(scopes), expires_at=None, limits=limits
            )

    return asyncio.run(make())


def replace_key(database_url: str, key: str, *, overlap: timedelta = timedelta(hours=1)) -> str:
    """A new key of the same holder; the other one is good for the overlap still."""

    async def replace() -> str:
        async with _connection(database_url) as connection:
            new = await keys.rotate(connection, id_of(key), overlap=overlap)
            assert new is not None
            return new

    return asyncio.run(replace())


def id_of(key: str) -> str:
    """The part of a key that is no secret."""
    return key.split("_")[1]


def is_accepted(database_url: str, key: str) -> bool:
    """Does this database know the key, and is it still good?"""

    async def look() -> bool:
        async with _connection(database_url) as connection:
            return await keys.authenticate(connection, key) is not None

    return asyncio.run(look())


@asynccontextmanager
async def _connection(database_url: str) -> AsyncIterator[AsyncConnection]:
    engine = make_engine(database_url, pool_size=1, application_name="agent-service devstack")
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()
