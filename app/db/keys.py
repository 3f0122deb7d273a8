"""API keys. Only a hash is stored: SHA-256 is enough for 256 random bits, there is nothing to guess."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.fetch import fetch_one
from app.domain.principal import KeyLimits, Principal, Scope

DEFAULT_LIMITS = KeyLimits()
KEY_PREFIX = "ask"
"""A key reads `ask_<id>_<secret>`: the id finds the row, the prefix lets secret scanners find a leaked key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A stored key; the secret itself is shown once, when it is created."""

    id: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


_CREATE = text("""
    INSERT INTO api_keys (id, tenant, name, key_hash, scopes, expires_at, holder, requests_per_s, burst, max_in_flight)
    VALUES (:id, :tenant, :name, :key_hash, :scopes, :expires_at, :id, :requests_per_s, :burst, :max_in_flight)
""")


async def create(
    connection: AsyncConnection,
    *,
    tenant: str,
    name: str,
    scopes: frozenset[Scope],
    expires_at: datetime | None,
    limits: KeyLimits = DEFAULT_LIMITS,
) -> str:
    """Make a key and return it: the only time that it is seen."""
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    await connection.execute(
        _CREATE,
        {
            "id": key_id,
            "tenant": tenant,
            "name": name,
            "key_hash": _hash(secret),
            "scopes": sorted(scopes),
            "expires_at": expires_at,
            **asdict(limits),
        },
    )
    return f"{KEY_PREFIX}_{key_id}_{secret}"


_FIND = text("""
    SELECT id, tenant, scopes, key_hash, coalesce(holder, id) AS holder, requests_per_s, burst, max_in_flight
    FROM api_keys
    WHERE id = :id AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
""")


async def authenticate(connection: AsyncConnection, presented: str) -> Principal | None:
    """Whose key this is, or None: unknown, expired or revoked. Does not tell which, nor by how long it takes."""
    prefix, _, rest = presented.partition("_")
    key_id, _, secret = rest.partition("_")
    if prefix != KEY_PREFIX or not secret or not key_id.isalnum() or not key_id.isascii():
        return None
    row = await fetch_one(connection, _FIND, {"id": key_id})
    if row is None or not hmac.compare_digest(bytes(row["key_hash"]), _hash(secret)):
        return None
    limits = KeyLimits(**{name: row[name] for name in KeyLimits.__dataclass_fields__})
    return Principal(
        row["id"], row["tenant"], frozenset(Scope(scope) for scope in row["scopes"]), row["holder"], limits
    )


_LIST = text("""
    SELECT id, tenant, name, scopes, created_at, expires_at, revoked_at FROM api_keys ORDER BY created_at
""")


async def list_all(connection: AsyncConnection) -> Sequence[ApiKey]:
    rows = (await connection.execute(_LIST)).mappings()
    return [ApiKey(**{**row, "scopes": frozenset(Scope(scope) for scope in row["scopes"])}) for row in rows]


_REVOKE = text("UPDATE api_keys SET revoked_at = now() WHERE id = :id AND revoked_at IS NULL")


async def revoke(connection: AsyncConnection, key_id: str) -> bool:
    """From now on the key is refused. False: there is no such key, or it was revoked before."""
    return (await connection.execute(_REVOKE, {"id": key_id})).rowcount > 0
