"""The formulas of the audit: how an event is hashed, a set of heads summed up, a checkpoint signed.

All texts are UTF-8, and JSON is in the canonical form of RFC 8785.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple, Self
from uuid import UUID

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

_CONTEXT = b"agent-service audit checkpoint v1\n"
"""Put before what is signed, so that the signature can mean nothing else."""
_string = lru_cache(maxsize=4096)(json.JSONEncoder(ensure_ascii=False).encode)
"""As JSON. The same few names of tenants, actors and kinds come again and again."""


class Event(NamedTuple):
    """One audit event as it is stored. `data` is the canonical JSON text; `hash` what the database says it is."""

    run_id: UUID
    seq: int
    at: datetime
    tenant: str
    actor: str
    kind: str
    data: str
    payload_sha256: bytes | None
    hash: bytes


def event_hash(event: Event, previous: bytes | None) -> bytes:
    """SHA-256 over the event and the hash of the one before it in its run; None: it is the first."""
    text = event_text(
        run_id=str(event.run_id),
        seq=event.seq,
        at=event.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        tenant=event.tenant,
        actor=event.actor,
        kind=event.kind,
        data=event.data,
        payload_sha256=event.payload_sha256.hex() if event.payload_sha256 is not None else None,
        previous=previous.hex() if previous is not None else None,
    )
    return hashlib.sha256(text.encode()).digest()


def event_text(
    *,
    run_id: str,
    seq: int,
    at: str,
    tenant: str,
    actor: str,
    kind: str,
    data: str,
    payload_sha256: str | None,
    previous: str | None,
) -> str:
    """What is hashed: the canonical JSON of an object with these members, in the order of their names.

    `at` is in UTC with six digits of the second, as in 2026-01-31T12:00:00.000000Z; hashes are hex.
    """
    payload = "null" if payload_sha256 is None else f'"{payload_sha256}"'
    before = "null" if previous is None else f'"{previous}"'
    return (
        f'{{"actor":{_string(actor)},"at":"{at}","data":{data},"kind":{_string(kind)},"payload_sha256":{payload},'
        f'"previous":{before},"run_id":"{run_id}","seq":{seq},"tenant":{_string(tenant)}}}'
    )


def payload_hash(salt: bytes, payload: str) -> bytes:
    """SHA-256 over the salt and the canonical JSON text of the payload."""
    return hashlib.sha256(salt + payload.encode()).digest()


class Leaf(NamedTuple):
    """The head of a run's chain, as a checkpoint saw it."""

    run_id: UUID
    seq: int
    hash: bytes

    @classmethod
    def decoded(cls, encoded: bytes) -> Self:
        return cls(UUID(bytes=encoded[:16]), int.from_bytes(encoded[16:20], "big"), encoded[20:])

    @property
    def encoded(self) -> bytes:
        """16 bytes of the run's id, 4 of the sequence number (big-endian), 32 of the hash."""
        return self.run_id.bytes + self.seq.to_bytes(4, "big") + self.hash


def leaf_hash(encoded: bytes) -> bytes:
    """What the tree is made of; it tells nothing to who does not know the run's id and hash."""
    return hashlib.sha256(b"\0" + encoded).digest()


def merkle_root(leaves: Sequence[Leaf]) -> bytes:
    """The Merkle tree hash of RFC 9162, section 2.1.1, over the leaves in the order of their runs' ids."""
    return root_of([leaf_hash(leaf.encoded) for leaf in sorted(leaves)])


def root_of(leaf_hashes: Sequence[bytes]) -> bytes:
    """The same over hashes of leaves, in that order."""
    level = list(leaf_hashes)
    if not level:
        return hashlib.sha256().digest()
    while len(level) > 1:  # pairing from the left gives the same tree as splitting at the largest power of two
        paired = [
            hashlib.sha256(b"\1" + left + right).digest() for left, right in zip(level[::2], level[1::2], strict=False)
        ]
        level = paired + level[len(paired) * 2 :]
    return level[0]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A signed statement about all heads that changed since the one before it.

    `body` is canonical JSON: `at` (UTC), `heads` (how many), `key` (id of the signing key), `number` (from 1, without
    gaps), `previous` (SHA-256 of the body before, hex; null for the first) and `root` (Merkle root, hex).
    """

    body: str
    signature: bytes

    @property
    def number(self) -> int:
        return int(self.content["number"])

    @property
    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.body)
        return content

    @property
    def digest(self) -> str:
        """What the next checkpoint calls `previous`."""
        return hashlib.sha256(self.body.encode()).hexdigest()

    def is_signed_by(self, key: Ed25519PublicKey) -> bool:
        try:
            key.verify(self.signature, _CONTEXT + self.body.encode())
        except InvalidSignature:
            return False
        return True

    @property
    def line(self) -> str:
        """How it is kept outside the database: one line of JSON, always the same for the same checkpoint."""
        return json.dumps({"body": self.body, "signature": base64.b64encode(self.signature).decode()}) + "\n"

    @classmethod
    def of_line(cls, line: str | bytes) -> Self:
        """Raises `ValueError` where the line is not one that `line` has made."""
        try:
            kept = json.loads(line)
            checkpoint = cls(str(kept["body"]), base64.b64decode(kept["signature"], validate=True))
            _ = checkpoint.number
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError("is not a checkpoint") from error
        return checkpoint


def make_checkpoint(
    leaves: Sequence[Leaf], *, previous: Checkpoint | None, at: datetime, key: Ed25519PrivateKey
) -> Checkpoint:
    """The checkpoint that follows `previous`."""
    return sign_checkpoint([leaf_hash(leaf.encoded) for leaf in sorted(leaves)], previous=previous, at=at, key=key)


def sign_checkpoint(
    leaf_hashes: Sequence[bytes], *, previous: Checkpoint | None, at: datetime, key: Ed25519PrivateKey
) -> Checkpoint:
    """The same over hashes of leaves, in the order of their runs' ids."""
    content = {
        "at": at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "heads": len(leaf_hashes),
        "key": key_id(key.public_key()),
        "number": previous.number + 1 if previous else 1,
        "previous": previous.digest if previous else None,
        "root": root_of(leaf_hashes).hex(),
    }
    body = json.dumps(content, sort_keys=True, separators=(",", ":"))  # plain ASCII and integers: canonical
    return Checkpoint(body, key.sign(_CONTEXT + body.encode()))


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]
