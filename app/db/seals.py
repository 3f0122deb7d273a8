"""What the sealer asks of Postgres: its lock, the heads that changed, and the checkpoints that were made of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.audit.proof import Checkpoint
from app.db.fetch import Row, fetch, fetch_one
from app.domain.errors import AnchorConflict

_SEAL_LOCK = 7_261_402_120
_LEAF_BYTES = 52

_TRY_LOCK = text("""
    SELECT pg_try_advisory_xact_lock(:key) AS is_ours,
           set_config('idle_in_transaction_session_timeout', CAST(:idle_ms AS text), true)
""")


async def try_lock(connection: AsyncConnection, *, idle_seconds: float) -> bool:
    """Become the one that seals, until the transaction ends, or has been idle for so long: its process is frozen."""
    row = await fetch_one(connection, _TRY_LOCK, {"key": _SEAL_LOCK, "idle_ms": int(idle_seconds * 1000)})
    return row is not None and bool(row["is_ours"])


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint as the database has it. `is_anchored`: it is known to be kept outside, too."""

    checkpoint: Checkpoint
    is_anchored: bool
    seconds_ago: float


_STORED = """
    SELECT number, body, signature, anchored_at IS NOT NULL AS is_anchored, clock_timestamp() AS now
    FROM audit_checkpoints
"""
_NEWEST = text(f"{_STORED} ORDER BY number DESC LIMIT 1")


async def newest(connection: AsyncConnection) -> Stored | None:
    """Raises `AnchorConflict` where it is no checkpoint, or not the one that its number says."""
    row = await fetch_one(connection, _NEWEST, {})
    return _stored(row) if row else None


_UNANCHORED = text(f"{_STORED} WHERE anchored_at IS NULL ORDER BY number")


async def unanchored(connection: AsyncConnection) -> Sequence[Checkpoint]:
    """Those that were stored before a process ended, or an anchor refused, in order. Raises `AnchorConflict`."""
    return [_stored(row).checkpoint for row in await fetch(connection, _UNANCHORED, {})]


def _stored(row: Row) -> Stored:
    checkpoint = Checkpoint(row["body"], row["signature"])
    try:
        ago = row["now"] - datetime.fromisoformat(checkpoint.content["at"])
        if checkpoint.number == row["number"]:
            return Stored(checkpoint, row["is_anchored"], ago.total_seconds())
    except (ValueError, TypeError, KeyError):
        pass
    raise AnchorConflict(f"checkpoint {row['number']} in the database is not what was stored there")


# One value instead of many rows: as rows, 50,000 heads would hold the event loop for a tenth of a second.
_UNSEALED = text("""
    SELECT clock_timestamp() AS at, string_agg(uuid_send(run_id) || int4send(seq) || hash, '' ORDER BY run_id) AS heads
    FROM (SELECT run_id, seq, hash FROM audit_heads WHERE NOT is_sealed ORDER BY run_id LIMIT :limit) AS changed
""")


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads in the order of their runs' ids, as they were together at one moment: leaves of the next checkpoint.

    Encoded, and not as `Leaf`: so many small objects would have the garbage collector hold up the event loop.
    """

    at: datetime
    encoded: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.encoded)


async def unsealed(connection: AsyncConnection, *, limit: int) -> Heads:
    """Heads that changed since they were last sealed: what is committed, in one snapshot."""
    row = await fetch_one(connection, _UNSEALED, {"limit": limit})
    assert row is not None
    heads: bytes = row["heads"] or b""
    return Heads(row["at"], [heads[at : at + _LEAF_BYTES] for at in range(0, len(heads), _LEAF_BYTES)])


_SEAL = text("""
    SELECT seal_audit(:number, :body, :signature,
                      CAST(:run_ids AS uuid[]), CAST(:seqs AS integer[]), CAST(:hashes AS bytea[]))
""")


def seal_parameters(checkpoint: Checkpoint, heads: Heads) -> dict[str, object]:
    """The parameters of `seal`. Takes microseconds for each head."""
    return {
        "number": checkpoint.number,
        "body": checkpoint.body,
        "signature": checkpoint.signature,
        "run_ids": _array(leaf[:16].hex() for leaf in heads.encoded),
        "seqs": _array(str(int.from_bytes(leaf[16:20], "big")) for leaf in heads.encoded),
        "hashes": _array(f'"\\\\x{leaf[20:].hex()}"' for leaf in heads.encoded),
    }


def _array(items: Iterable[str]) -> str:
    return "{" + ",".join(items) + "}"


async def seal(connection: AsyncConnection, parameters: dict[str, object]) -> None:
    """Store a checkpoint with its leaves. Raises `sqlalchemy.exc.IntegrityError` where its number is taken."""
    await fetch(connection, _SEAL, parameters)


_MARK = text("SELECT mark_sealed(:number, CAST(:run_ids AS uuid[]))")


async def mark(connection: AsyncConnection, number: int, heads: Sequence[bytes]) -> None:
    """Mark as sealed those of the heads that are still what the checkpoint says, and that nobody is writing to."""
    await fetch(connection, _MARK, {"number": number, "run_ids": _array(leaf[:16].hex() for leaf in heads)})


_NOTE_ANCHORED = text("SELECT note_anchored(:number)")


async def note_anchored(connection: AsyncConnection, checkpoint: Checkpoint) -> None:
    """It is kept outside the database now."""
    await fetch(connection, _NOTE_ANCHORED, {"number": checkpoint.number})
