"""The formulas of the audit, against RFC 8785, RFC 9162 and values worked out by hand."""

import hashlib
import json
from datetime import UTC, datetime, timedelta, timezone
from random import Random
from typing import Any
from uuid import UUID

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.audit.keys import load_private_key, load_public_key, new_private_key_pem, public_key_pem
from app.audit.proof import Checkpoint, Event, Leaf, event_hash, key_id, make_checkpoint, merkle_root, payload_hash

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RUN = UUID("01890000-0000-7000-8000-000000000001")
NOW = datetime(2025, 3, 1, 12, 30, 0, 42, tzinfo=UTC)
EVENT = Event(RUN, 2, NOW, "tenant", "worker:w", "run.claimed", '{"attempt":1}', None, b"")


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def leaves(how_many: int) -> list[Leaf]:
    return [Leaf(UUID(int=number + 1), number % 7 + 1, sha256(bytes([number % 256]))) for number in range(how_many)]


def test_an_events_hash_is_that_of_its_canonical_json() -> None:
    text: dict[str, Any] = {
        "actor": "worker:w",
        "at": "2025-03-01T12:30:00.000042Z",
        "data": {"attempt": 1},
        "kind": "run.claimed",
        "payload_sha256": "ab" * 32,
        "previous": "cd" * 32,
        "run_id": str(RUN),
        "seq": 2,
        "tenant": "tenant",
    }
    event = EVENT._replace(payload_sha256=bytes.fromhex("ab" * 32))
    assert event_hash(event, bytes.fromhex("cd" * 32)) == sha256(rfc8785.dumps(text))
    first = {**text, "payload_sha256": None, "previous": None}
    assert event_hash(EVENT, None) == sha256(rfc8785.dumps(first))


@pytest.mark.parametrize(
    "odd",
    ['"quoted"', "back\\slash", "\x01\x1f\x7f\x80", "\b\t\n\f\r", "ünï", "🙈", "\u2028\u2029", "\ufeff"],
)
def test_odd_text_is_hashed_as_rfc_8785_writes_it(odd: str) -> None:
    event = EVENT._replace(actor=odd, tenant=odd, kind=odd, data=rfc8785.dumps({"key": odd}).decode())
    text = {
        "actor": odd,
        "tenant": odd,
        "kind": odd,
        "data": {"key": odd},
        "at": "2025-03-01T12:30:00.000042Z",
        "payload_sha256": None,
        "previous": None,
        "run_id": str(RUN),
        "seq": 2,
    }
    assert event_hash(event, None) == sha256(rfc8785.dumps(text))


def test_the_same_moment_in_another_zone_is_the_same_event() -> None:
    elsewhere = EVENT._replace(at=NOW.astimezone(timezone(timedelta(hours=-5))))
    assert event_hash(elsewhere, None) == event_hash(EVENT, None)


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": UUID(int=1)},
        {"seq": 3},
        {"at": NOW + timedelta(microseconds=1)},
        {"tenant": "other"},
        {"actor": "other"},
        {"kind": "other"},
        {"data": "{}"},
        {"payload_sha256": bytes(32)},
    ],
)
def test_every_member_of_an_event_counts(change: dict[str, object]) -> None:
    assert event_hash(EVENT._replace(**change), None) != event_hash(EVENT, None)  # type: ignore[arg-type]
    assert event_hash(EVENT, bytes(32)) != event_hash(EVENT, None)


def test_a_payload_is_bound_with_its_salt() -> None:
    assert payload_hash(b"salt", '"é"') == sha256(b'salt"\xc3\xa9"')
    assert payload_hash(b"salt", "1") != payload_hash(b"salz", "1")


def test_a_leaf_is_52_bytes_and_comes_back_from_them() -> None:
    leaf = Leaf(RUN, 258, bytes(range(32)))
    assert leaf.encoded == RUN.bytes + b"\0\0\1\2" + bytes(range(32))
    assert Leaf.decoded(leaf.encoded) == leaf


def rfc_9162(inputs: list[bytes]) -> bytes:
    """Section 2.1.1, word for word."""
    if not inputs:
        return sha256(b"")
    if len(inputs) == 1:
        return sha256(b"\0" + inputs[0])
    split = 1
    while split * 2 < len(inputs):
        split *= 2
    return sha256(b"\1" + rfc_9162(inputs[:split]) + rfc_9162(inputs[split:]))


@pytest.mark.parametrize("how_many", [*range(18), 63, 64, 65, 1000])
def test_the_root_is_the_merkle_tree_hash_of_rfc_9162(how_many: int) -> None:
    some = leaves(how_many)
    assert merkle_root(some) == rfc_9162([leaf.encoded for leaf in some])


def test_the_root_does_not_depend_on_the_order_in_which_leaves_come_and_does_on_every_byte() -> None:
    some = leaves(9)
    shuffled = Random(1).sample(some, len(some))
    assert merkle_root(shuffled) == merkle_root(some)
    for other in (some[0]._replace(seq=99), some[0]._replace(hash=bytes(32)), some[0]._replace(run_id=UUID(int=0))):
        assert merkle_root([other, *some[1:]]) != merkle_root(some)
    assert merkle_root([*some, some[-1]]) != merkle_root(some)


def test_a_leaf_cannot_pass_for_a_node() -> None:
    left, right = (sha256(b"\0" + leaf.encoded) for leaf in leaves(2))
    assert sha256(b"\0" + left + right) != merkle_root(leaves(2))


def test_a_checkpoint_says_what_it_is_of_and_follows_the_one_before() -> None:
    first = make_checkpoint(leaves(3), previous=None, at=NOW, key=KEY)
    assert first.content == {
        "at": "2025-03-01T12:30:00.000042Z",
        "heads": 3,
        "key": key_id(KEY.public_key()),
        "number": 1,
        "previous": None,
        "root": merkle_root(leaves(3)).hex(),
    }
    assert first.body.encode() == rfc8785.dumps(first.content)
    assert make_checkpoint(leaves(3)[::-1], previous=None, at=NOW, key=KEY) == first
    second = make_checkpoint(leaves(1), previous=first, at=NOW, key=KEY)
    assert (second.number, second.content["previous"]) == (2, hashlib.sha256(first.body.encode()).hexdigest())


def test_a_checkpoints_signature_is_good_for_its_very_body_under_its_own_key_in_this_context() -> None:
    checkpoint = make_checkpoint(leaves(3), previous=None, at=NOW, key=KEY)
    assert checkpoint.is_signed_by(KEY.public_key())
    assert not checkpoint.is_signed_by(Ed25519PrivateKey.generate().public_key())
    assert not Checkpoint(checkpoint.body.replace('"heads":3', '"heads":4'), checkpoint.signature).is_signed_by(
        KEY.public_key()
    )
    assert not Checkpoint(checkpoint.body, checkpoint.signature[:-1]).is_signed_by(KEY.public_key())
    assert not Checkpoint(checkpoint.body, KEY.sign(checkpoint.body.encode())).is_signed_by(KEY.public_key())
    assert checkpoint.signature == KEY.sign(b"agent-service audit checkpoint v1\n" + checkpoint.body.encode())


def test_a_checkpoint_is_one_line_and_comes_back_from_it() -> None:
    checkpoint = make_checkpoint(leaves(3), previous=None, at=NOW, key=KEY)
    assert checkpoint.line.count("\n") == 1
    assert set(json.loads(checkpoint.line)) == {"body", "signature"}
    assert Checkpoint.of_line(checkpoint.line) == Checkpoint.of_line(checkpoint.line.encode()) == checkpoint
    for line in ("", "\0\0", "1", "[]", "{}", checkpoint.line[:-9], '{"body": "{}", "signature": ""}', b"\xff\xfe"):
        with pytest.raises(ValueError, match="is not a checkpoint"):
            Checkpoint.of_line(line)


def test_keys_come_back_from_their_text_also_where_a_variable_may_hold_one_line_only() -> None:
    private = new_private_key_pem()
    public = load_public_key(public_key_pem(private))
    assert key_id(public) == key_id(load_private_key(private.replace("\n", "\\n")).public_key())
    assert key_id(public) == key_id(load_private_key(f"\n {private.strip()} \n").public_key())
    assert new_private_key_pem() != private


def test_what_is_no_key_is_refused_without_being_quoted() -> None:
    private = new_private_key_pem()
    for wrong in ("", "secret", private[:60], public_key_pem(private), private.replace("PRIVATE", "SECRET")):
        with pytest.raises(ValueError, match="is not an Ed25519 private key") as caught:
            load_private_key(wrong)
        assert "secret" not in str(caught.value)
    for wrong in ("", "secret", private):
        with pytest.raises(ValueError, match="is not an Ed25519 public key"):
            load_public_key(wrong)
