"""API keys. Only a hash is stored: SHA-256 is enough for 256 random bits, there is nothing to guess."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.fetch import Row, fetch, fetch_one
from app.domain.principal import KeyLimits, Principal, Scope

DEFAULT_LIMITS = KeyLimits()
KEY_PREFIX = "ask"
"""A key reads `ask_<id>_<secret>`: the id finds the row, the prefix lets secret scanners find a leaked key."""

_KEY = re.compile(rf"{KEY_PREFIX}_([0-9a-f]{{12}})_([A-Za-z0-9_-]{{43}})")
_NO_HASH = bytes(hashlib.sha256().digest_size)
"""What the secret of a key that does not exist is compared with. Nothing has this hash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A stored key; the secret itself is shown once, when it is created.

    `holder`: the id of the first key in the row of those that replaced each other. `replaced_by`: the next one in it.
    """

    id: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    holder: str
    limits: KeyLimits
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    replaced_by: str | None
    last_used_at: datetime | None


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _new_key() -> tuple[str, str, str]:
    """Its id, its secret, and both as the holder is given them."""
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    return key_id, secret, f"{KEY_PREFIX}_{key_id}_{secret}"


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
    key_id, secret, key = _new_key()
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
    return key


_IS_VALID = "revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())"
_LIMITS = ", ".join(KeyLimits.__dataclass_fields__)

_FIND = text(f"""
    SELECT id, tenant, scopes, key_hash, coalesce(holder, id) AS holder, {_LIMITS}
    FROM api_keys WHERE id = :id AND {_IS_VALID}
""")  # noqa: S608 - constants


def is_well_formed(presented: str) -> bool:
    """Could this be a key? What cannot be one needs no database to be refused; that it is none, everybody can see."""
    return _KEY.fullmatch(presented) is not None


async def authenticate(connection: AsyncConnection, presented: str) -> Principal | None:
    """Whose key this is, or None: unknown, expired or revoked. Does not tell which, nor by how long it takes."""
    if (match := _KEY.fullmatch(presented)) is None:
        return None
    key_id, secret = match.groups()
    row = await fetch_one(connection, _FIND, {"id": key_id})
    expected = bytes(row["key_hash"]) if row else _NO_HASH
    is_right = hmac.compare_digest(expected, _hash(secret))
    if row is None or not is_right:
        return None
    scopes = frozenset(Scope(scope) for scope in row["scopes"])
    return Principal(row["id"], row["tenant"], scopes, row["holder"], _limits_of(row))


def _limits_of(row: Row) -> KeyLimits:
    return KeyLimits(**{name: row[name] for name in KeyLimits.__dataclass_fields__})


_ROTATE = text(f"""
    WITH old AS (
        SELECT * FROM api_keys WHERE id = :id AND replaced_by IS NULL AND {_IS_VALID} FOR UPDATE
    ), replaced AS (
        UPDATE api_keys
        SET holder = coalesce(old.holder, old.id), replaced_by = :new_id,
            expires_at = least(old.expires_at, now() + make_interval(secs => :overlap_s))
        FROM old WHERE api_keys.id = old.id
    )
    INSERT INTO api_keys (id, tenant, name, key_hash, scopes, expires_at, holder, {_LIMITS})
    SELECT :new_id, tenant, name, :key_hash, scopes, coalesce(CAST(:expires_at AS timestamptz), expires_at),
           coalesce(holder, id), {_LIMITS}
    FROM old
    RETURNING id
""")  # noqa: S608


async def rotate(
    connection: AsyncConnection, key_id: str, *, overlap: timedelta, expires_at: datetime | None = None
) -> str | None:
    """Make a key that replaces another, and return it: the same holder's, who may use both for the overlap.

    `expires_at`: of the new key; None: when the old one would have expired. None is returned where the old key is
    unknown, not valid any more, or was replaced before: of two rotations at once, one finds that the other was first.
    """
    new_id, secret, key = _new_key()
    parameters = {
        "id": key_id,
        "new_id": new_id,
        "key_hash": _hash(secret),
        "overlap_s": overlap.total_seconds(),
        "expires_at": expires_at,
    }
    return key if await fetch(connection, _ROTATE, parameters) else None


_COLUMNS = f"""
    id, tenant, name, scopes, coalesce(holder, id) AS holder, {_LIMITS}, created_at, expires_at, revoked_at,
    replaced_by, last_used_at
"""
_GET = text(f"SELECT {_COLUMNS} FROM api_keys WHERE id = :id")  # noqa: S608
_LIST = text(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created_at, id")  # noqa: S608


async def get(connection: AsyncConnection, key_id: str) -> ApiKey | None:
    """The key, whatever became of it; None: there never was one of this id."""
    row = await fetch_one(connection, _GET, {"id": key_id})
    return _key_of(row) if row else None


async def list_all(connection: AsyncConnection) -> Sequence[ApiKey]:
    return [_key_of(row) for row in await fetch(connection, _LIST, {})]


def _key_of(row: Row) -> ApiKey:
    same = {name: row[name] for name in ApiKey.__dataclass_fields__ if name in row}
    return ApiKey(**{**same, "scopes": frozenset(Scope(scope) for scope in row["scopes"]), "limits": _limits_of(row)})


_REVOKE = text("UPDATE api_keys SET revoked_at = now() WHERE id = :id AND revoked_at IS NULL")


async def revoke(connection: AsyncConnection, key_id: str) -> bool:
    """From now on the key is refused. False: there is no such key, or it was revoked before."""
    return (await connection.execute(_REVOKE, {"id": key_id})).rowcount > 0


_LIMIT = text(f"""
    UPDATE api_keys
    SET requests_per_s = coalesce(:requests_per_s, requests_per_s), burst = coalesce(:burst, burst),
        max_in_flight = coalesce(:max_in_flight, max_in_flight)
    WHERE coalesce(holder, id) = (SELECT coalesce(holder, id) FROM api_keys WHERE id = :id AND {_IS_VALID})
      AND {_IS_VALID}
    RETURNING id
""")  # noqa: S608


async def limit(
    connection: AsyncConnection,
    key_id: str,
    *,
    requests_per_s: float | None = None,
    burst: int | None = None,
    max_in_flight: int | None = None,
) -> Sequence[str]:
    """Change what a key's holder may ask for, where it is given: for all of the holder's valid keys, whose ids are
    returned. None of them: the key is unknown, or not valid any more.
    """
    parameters = {"id": key_id, "requests_per_s": requests_per_s, "burst": burst, "max_in_flight": max_in_flight}
    rows = await connection.execute(_LIMIT, parameters)
    return sorted(rows.scalars())


_NOTE_USED = text("""
    WITH used AS (
        SELECT * FROM unnest(CAST(:ids AS text[]), CAST(:ages AS double precision[])) AS used (id, age_s)
    ), free AS (
        SELECT api_keys.id FROM api_keys JOIN used USING (id) FOR NO KEY UPDATE OF api_keys SKIP LOCKED
    ), noted AS (
        UPDATE api_keys SET last_used_at = greatest(last_used_at, now() - make_interval(secs => used.age_s))
        FROM free JOIN used USING (id) WHERE api_keys.id = free.id
    )
    SELECT id FROM api_keys JOIN used USING (id) WHERE id NOT IN (SELECT id FROM free)
""")


async def note_used(connection: AsyncConnection, ages: Mapping[str, float]) -> Sequence[str]:
    """Write down how many seconds ago keys were last used; what is later already stays.

    Returns the keys that are left out, because somebody holds their rows: nobody waits for anybody.
    """
    rows = await fetch(connection, _NOTE_USED, {"ids": list(ages), "ages": list(ages.values())})
    return [row["id"] for row in rows]


_HOLDERS = text("SELECT DISTINCT coalesce(holder, id) AS holder FROM api_keys WHERE id = ANY(:ids)")


async def holders_of(connection: AsyncConnection, key_ids: Collection[str]) -> set[str]:
    """Whose keys these are, or were."""
    return {row["holder"] for row in await fetch(connection, _HOLDERS, {"ids": list(key_ids)})}
