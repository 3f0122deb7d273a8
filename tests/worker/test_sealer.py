"""Sealing, on a database of its own: what a checkpoint holds, what is left for the next, and what stops it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import SecretStr
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

import worker.sealer
from app.anchor import FileAnchor, open_anchor
from app.audit.keys import load_public_key, new_private_key_pem, public_key_pem
from app.audit.proof import Checkpoint, Leaf, make_checkpoint, merkle_root
from app.background import in_background
from app.config import Settings
from app.db import seals
from app.db.engine import make_engine, transactional
from app.db.seals import Heads
from app.domain.errors import AnchorConflict, AnchorUnavailable, ConfigurationError
from tests.object_store import an_object_store
from tests.stack import Stack
from worker.sealer import Sealer, open_sealer

KEY = Ed25519PrivateKey.generate()
APPEND = 'SELECT append_audit(%s, \'t\', \'w\', \'[{"kind": "run.claimed", "data": "{}"}]\')'


@dataclass
class Place:
    """A database, an anchor, and what is in them."""

    engine: AsyncEngine
    database_url: str
    path: Path

    @property
    def anchor(self) -> FileAnchor:
        return FileAnchor(self.path)

    @property
    def sealer(self) -> Sealer:
        return Sealer(self.engine, KEY, self.anchor)

    def rows(self, statement: str, *parameters: object) -> list[Any]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall()

    def append(self, run_id: UUID | None = None) -> UUID:
        run_id = run_id or uuid4()
        self.rows(APPEND, run_id)
        return run_id

    def unsealed(self) -> list[UUID]:
        return [row[0] for row in self.rows("SELECT run_id FROM audit_heads WHERE NOT is_sealed ORDER BY run_id")]

    def stored(self) -> list[Checkpoint]:
        rows = self.rows("SELECT body, signature FROM audit_checkpoints ORDER BY number")
        return [Checkpoint(body, bytes(signature)) for body, signature in rows]

    def leaves(self, number: int) -> list[Leaf]:
        statement = "SELECT run_id, seq, hash FROM audit_leaves WHERE checkpoint = %s ORDER BY run_id"
        return [Leaf(run_id, seq, bytes(hash)) for run_id, seq, hash in self.rows(statement, number)]  # noqa: A001

    def sealed_seqs(self, run_id: UUID) -> list[tuple[int, int]]:
        statement = "SELECT checkpoint, seq FROM audit_leaves WHERE run_id = %s ORDER BY checkpoint"
        return self.rows(statement, run_id)

    def anchored(self) -> list[Checkpoint]:
        return list(self.anchor.read())

    def pending(self) -> list[int]:
        statement = "SELECT number FROM audit_checkpoints WHERE anchored_at IS NULL ORDER BY number"
        return [row[0] for row in self.rows(statement)]


def play(database_url: str, tmp_path: Path, scenario: Callable[[Place], Awaitable[None]]) -> None:
    async def run() -> None:
        engine = make_engine(database_url, pool_size=4, application_name="test")
        try:
            await scenario(Place(engine, database_url, tmp_path / "checkpoints.jsonl"))
        finally:
            await engine.dispose()

    asyncio.run(run())


def test_a_checkpoint_signs_the_heads_that_changed_and_is_kept_outside(database_url: str, tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        run_ids = sorted(place.append() for _ in range(5))
        place.append(run_ids[0])
        await place.sealer.seal()
        [checkpoint] = place.stored()
        heads = [Leaf(*row) for row in place.rows("SELECT run_id, seq, hash FROM audit_heads ORDER BY run_id")]
        assert [leaf.run_id for leaf in heads] == run_ids
        assert place.leaves(1) == heads
        assert checkpoint.content["root"] == merkle_root(heads).hex()
        assert checkpoint.content["heads"] == 5
        assert checkpoint.is_signed_by(KEY.public_key())
        assert place.anchored() == [checkpoint]
        assert (place.unsealed(), place.pending()) == ([], [])

    play(database_url, tmp_path, scenario)


def test_the_next_checkpoint_holds_what_changed_since_and_follows_the_one_before(
    database_url: str, tmp_path: Path
) -> None:
    async def scenario(place: Place) -> None:
        old, grown = place.append(), place.append()
        await place.sealer.seal()
        place.append(grown)
        new = place.append()
        await place.sealer.seal()
        first, second = place.stored()
        assert second.content["previous"] == first.digest
        assert {leaf.run_id: leaf.seq for leaf in place.leaves(2)} == {grown: 2, new: 1}
        assert place.sealed_seqs(old) == [(1, 1)]

    play(database_url, tmp_path, scenario)


def test_where_nothing_changed_there_is_no_checkpoint(database_url: str, tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        await place.sealer.seal()
        assert place.stored() == place.anchored() == []
        place.append()
        for _ in range(3):
            await place.sealer.seal()
        assert [checkpoint.number for checkpoint in place.stored()] == [1]

    play(database_url, tmp_path, scenario)


def test_what_a_transaction_adds_that_is_open_during_a_round_is_sealed_in_the_next(
    database_url: str, tmp_path: Path
) -> None:
    async def scenario(place: Place) -> None:
        known, sealed_before = place.append(), place.append()
        await place.sealer.seal()
        place.append(known)
        new = uuid4()
        with psycopg.connect(database_url) as open_transaction:
            for run_id in (known, sealed_before, new):
                open_transaction.execute(APPEND, [run_id])
            await asyncio.wait_for(place.sealer.seal(), 5)  # does not wait for those locks either
            assert place.leaves(2) == [Leaf(known, 2, place.leaves(2)[0].hash)]
        await place.sealer.seal()
        assert {leaf.run_id: leaf.seq for leaf in place.leaves(3)} == {known: 3, sealed_before: 2, new: 1}
        assert place.unsealed() == []

    play(database_url, tmp_path, scenario)


def test_a_head_that_somebody_holds_while_it_is_sealed_is_not_waited_for_and_comes_again(
    database_url: str, owner_url: str, tmp_path: Path
) -> None:
    async def scenario(place: Place) -> None:
        held, free = place.append(), place.append()
        with psycopg.connect(owner_url) as somebody:
            somebody.execute("SELECT FROM audit_heads WHERE run_id = %s FOR UPDATE", [held])
            await asyncio.wait_for(place.sealer.seal(), 5)
            assert place.unsealed() == [held]
        await place.sealer.seal()
        assert place.sealed_seqs(held) == [(1, 1), (2, 1)]
        assert place.sealed_seqs(free) == [(1, 1)]
        assert place.unsealed() == []

    play(database_url, tmp_path, scenario)


def test_a_head_that_moves_on_between_being_read_and_being_marked_stays_unsealed(
    database_url: str, tmp_path: Path
) -> None:
    async def scenario(place: Place) -> None:
        moving, still = place.append(), place.append()
        async with place.engine.connect() as connection:
            heads = await seals.unsealed(connection, limit=9)
            place.append(moving)
            await seals.seal(connection, seals.seal_parameters(first_checkpoint(heads), heads))
            await seals.mark(connection, 1, heads.encoded)
        assert place.unsealed() == [moving]
        assert place.sealed_seqs(still) == [(1, 1)]
        await place.sealer.seal()
        assert place.sealed_seqs(moving) == [(1, 1), (2, 2)]

    play(database_url, tmp_path, scenario)


def first_checkpoint(heads: Heads | None = None) -> Checkpoint:
    leaves = [Leaf.decoded(encoded) for encoded in heads.encoded] if heads else []
    return make_checkpoint(leaves, previous=None, at=now(), key=KEY)


def now() -> datetime:
    return datetime.now(UTC)


def test_no_event_is_missed_while_runs_go_on(database_url: str, tmp_path: Path) -> None:
    """Four connections append without a pause, in transactions that stay open for a moment; rounds in between."""
    run_ids = [uuid4() for _ in range(40)]

    def append_for(seconds: float, own: Sequence[UUID]) -> None:
        until = time.monotonic() + seconds
        with psycopg.connect(database_url) as connection:
            while time.monotonic() < until:
                for run_id in own:
                    connection.execute(APPEND, [run_id])
                    connection.commit()

    async def scenario(place: Place) -> None:
        sealer = place.sealer
        with ThreadPoolExecutor(4) as threads:
            busy = [threads.submit(append_for, 2.0, run_ids[part::4]) for part in range(4)]
            while not all(one.done() for one in busy):
                await sealer.seal()
            for one in busy:
                one.result()
        await sealer.seal()
        assert place.unsealed() == []
        wrong = place.rows("""
            SELECT FROM audit_leaves LEFT JOIN audit_events USING (run_id, seq)
            WHERE audit_leaves.hash IS DISTINCT FROM audit_events.hash
        """)
        assert wrong == []
        last = place.rows("""
            SELECT FROM audit_heads JOIN (SELECT run_id, max(seq) AS seq FROM audit_leaves GROUP BY run_id) AS sealed
                        USING (run_id, seq)
        """)
        assert len(last) == len(run_ids)
        assert len(place.stored()) > 3
        for checkpoint in place.stored():
            assert merkle_root(place.leaves(checkpoint.number)).hex() == checkpoint.content["root"]
        assert place.anchored() == place.stored()

    play(database_url, tmp_path, scenario)


def test_more_heads_than_one_checkpoint_takes_go_into_the_next_at_once(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.sealer, "HEADS", 3)
    monkeypatch.setattr(worker.sealer, "MARKS", 2)

    async def scenario(place: Place) -> None:
        run_ids = sorted(place.append() for _ in range(7))
        await place.sealer.seal()
        assert [[leaf.run_id for leaf in place.leaves(number)] for number in (1, 2, 3)] == [
            run_ids[:3],
            run_ids[3:6],
            run_ids[6:],
        ]
        assert place.anchored() == place.stored()
        assert [checkpoint.number for checkpoint in place.stored()] == [1, 2, 3]
        assert place.unsealed() == []

    play(database_url, tmp_path, scenario)


def test_what_could_not_be_kept_outside_is_kept_first_of_all_in_a_later_round(
    database_url: str, tmp_path: Path
) -> None:
    async def scenario(place: Place) -> None:
        place.path.symlink_to("/dev/full")
        for _ in range(2):
            place.append()
            with pytest.raises(AnchorUnavailable):
                await place.sealer.seal()
        assert (len(place.stored()), place.pending()) == (1, [1])  # nothing on top of what is not safe yet
        place.path.unlink()
        await place.sealer.seal()
        assert place.anchored() == place.stored()
        assert (len(place.stored()), place.pending(), place.unsealed()) == (2, [], [])

    play(database_url, tmp_path, scenario)


def test_what_processes_that_died_had_stored_is_kept_outside_once_and_in_order(
    database_url: str, tmp_path: Path
) -> None:
    async def scenario(place: Place) -> None:
        place.append()
        async with place.engine.connect() as connection:
            heads = await seals.unsealed(connection, limit=9)
            first = first_checkpoint(heads)
            await seals.seal(connection, seals.seal_parameters(first, heads))
            place.anchor.append(first)  # and then, before it was noted, the process died
            second = make_checkpoint([], previous=first, at=now(), key=KEY)
            third = make_checkpoint([], previous=second, at=now(), key=KEY)
            for checkpoint in (second, third):
                await seals.seal(connection, seals.seal_parameters(checkpoint, Heads(now(), [])))
        await place.sealer.seal()
        assert place.anchored() == place.stored()
        assert place.stored()[:3] == [first, second, third]
        assert place.sealed_seqs(heads_of(heads)[0]) == [(1, 1), (4, 1)]  # it had not been marked either
        assert (place.pending(), place.unsealed()) == ([], [])

    play(database_url, tmp_path, scenario)


def heads_of(heads: Heads) -> list[UUID]:
    return [Leaf.decoded(encoded).run_id for encoded in heads.encoded]


def test_several_sealers_at_once_make_one_checkpoint(database_url: str, tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        for number in range(1, 6):
            place.append()
            await asyncio.gather(*(place.sealer.seal() for _ in range(3)))
            assert [checkpoint.number for checkpoint in place.stored()] == list(range(1, number + 1))
        assert place.anchored() == place.stored()

    play(database_url, tmp_path, scenario)


def test_a_number_is_given_once_whoever_believes_to_be_alone(database_url: str, tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        place.append()
        async with place.engine.connect() as connection:
            heads = await seals.unsealed(connection, limit=9)
            await seals.seal(connection, seals.seal_parameters(first_checkpoint(heads), heads))
            place.append()
            late = await seals.unsealed(connection, limit=9)
            with pytest.raises(IntegrityError):
                await seals.seal(connection, seals.seal_parameters(first_checkpoint(late), late))
        assert len(place.stored()) == 1
        assert [leaf.encoded for leaf in place.leaves(1)] == heads.encoded

    play(database_url, tmp_path, scenario)


def test_a_frozen_sealer_does_not_keep_the_others_from_it(database_url: str, tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        place.append()
        frozen = await transactional(place.engine).connect()
        assert await seals.try_lock(frozen, idle_seconds=1)
        await place.sealer.seal()
        assert place.stored() == []
        await asyncio.sleep(1.5)
        await place.sealer.seal()
        assert len(place.stored()) == 1
        with pytest.raises(SQLAlchemyError):
            await seals.newest(frozen)
        await frozen.close()

    play(database_url, tmp_path, scenario)


def test_nothing_is_sealed_where_the_anchor_is_ahead_of_the_database(database_url: str, tmp_path: Path) -> None:
    """As after an old backup was restored."""

    async def scenario(place: Place) -> None:
        ahead = [first_checkpoint()]
        for _ in range(3):
            ahead.append(make_checkpoint([], previous=ahead[-1], at=now(), key=KEY))
        place.append()
        place.anchor.append(ahead[0])
        with pytest.raises(AnchorConflict, match="holds checkpoint 1, and the newest in the database is 0"):
            await place.sealer.seal()
        place.path.unlink()
        await place.sealer.seal()
        for checkpoint in ahead[1:]:
            place.anchor.append(checkpoint)
        place.append()
        with pytest.raises(AnchorConflict, match="holds checkpoint 2, and the newest in the database is 1"):
            await place.sealer.seal()
        assert len(place.stored()) == 1
        assert len(place.anchored()) == 4
        assert len(place.unsealed()) == 1

    play(database_url, tmp_path, scenario)


def test_nothing_is_sealed_where_the_anchor_holds_something_else(database_url: str, tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        place.append()
        await place.sealer.seal()
        place.path.write_text(first_checkpoint().line)
        place.append()
        with pytest.raises(AnchorConflict, match="another checkpoint 1"):
            await place.sealer.seal()
        assert len(place.stored()) == len(place.anchored()) == 1

    play(database_url, tmp_path, scenario)


def test_a_forged_checkpoint_in_the_database_does_not_reach_the_anchor(database_url: str, tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        place.append()
        await place.sealer.seal()
        forged = make_checkpoint([], previous=place.stored()[0], at=now(), key=Ed25519PrivateKey.generate())
        async with place.engine.connect() as connection:
            await seals.seal(connection, seals.seal_parameters(forged, Heads(now(), [])))
        with pytest.raises(AnchorConflict, match="checkpoint 2 in the database is not signed with AUDIT_SIGNING_KEY"):
            await place.sealer.seal()
        assert [checkpoint.number for checkpoint in place.anchored()] == [1]

    play(database_url, tmp_path, scenario)


@pytest.mark.parametrize("body", ["", "{}", "[]", '{"number":7,"at":"2025-01-01T00:00:00Z"}', '{"number":1,"at":"x"}'])
def test_what_is_no_checkpoint_in_the_database_stops_sealing_and_not_the_worker(
    database_url: str, tmp_path: Path, body: str
) -> None:
    async def scenario(place: Place) -> None:
        place.append()
        async with place.engine.connect() as connection:
            parameters = {"number": 1, "body": body, "signature": b"", "run_ids": "{}", "seqs": "{}", "hashes": "{}"}
            await seals.seal(connection, parameters)
        with pytest.raises(AnchorConflict, match="checkpoint 1 in the database is not what was stored"):
            await place.sealer.seal()
        assert place.anchored() == []

    play(database_url, tmp_path, scenario)


def test_an_anchor_that_lost_everything_is_told_of_and_sealing_goes_on(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(place: Place) -> None:
        place.append()
        await place.sealer.seal()
        place.path.unlink()
        place.append()
        await place.sealer.seal()
        assert [checkpoint.number for checkpoint in place.anchored()] == [2]
        assert [(record.levelname, record.message) for record in caplog.records if record.levelname != "INFO"] == [
            ("WARNING", "the anchor has lost a checkpoint")
        ]

    play(database_url, tmp_path, scenario)


def test_several_workers_do_not_seal_each_at_its_own_minute(database_url: str, tmp_path: Path) -> None:
    async def scenario(place: Place) -> None:
        place.append()
        await place.sealer.seal(unless_within=60)
        place.append()
        await place.sealer.seal(unless_within=60)
        assert len(place.stored()) == 1
        await asyncio.sleep(0.2)
        await place.sealer.seal(unless_within=0.1)
        assert len(place.stored()) == 2

    play(database_url, tmp_path, scenario)


def test_failures_are_logged_in_each_round_with_advice_and_end_with_their_cause(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker.sealer, "SEAL_SECONDS", 0.05)

    def logged(level: int) -> list[Any]:
        return [record for record in caplog.records if record.levelno == level]

    async def scenario(place: Place) -> None:
        place.append()
        ahead = first_checkpoint()
        place.anchor.append(ahead)
        async with in_background(place.sealer.keep_sealing()) as sealing:
            await until(lambda: len(logged(logging.ERROR)) >= 3)
            fields = vars(logged(logging.ERROR)[-1])["fields"]
            assert "the anchor holds checkpoint 1, and the newest in the database is 0" in fields["error"]
            assert "AUDIT_ANCHOR" in fields["advice"]
            assert "agent-service audit verify" in fields["advice"]
            place.path.unlink()
            place.path.mkdir()
            await until(lambda: len(logged(logging.WARNING)) >= 3)
            place.path.rmdir()
            await until(lambda: len(place.stored()) == 1 and not place.pending())
            place.append()
            await until(lambda: len(place.anchored()) == 2)
            assert not sealing.done()
        [first, *_] = [record for record in caplog.records if record.message == "audit sealed"]
        assert vars(first)["fields"].keys() == {"checkpoint", "heads", "ms"}

    with caplog.at_level(logging.INFO, "worker.sealer"):
        play(database_url, tmp_path, scenario)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


def test_an_object_store_that_hangs_holds_up_nothing_but_sealing(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.sealer, "ANCHOR_SECONDS", 0.7)

    async def scenario(place: Place) -> None:
        with an_object_store() as store:
            for name, value in store.env().items():
                monkeypatch.setenv(name, value)
            sealer = Sealer(place.engine, KEY, open_anchor("s3://bucket/audit"))
            run_ids = [place.append() for _ in range(3)]
            await sealer.seal()
            for run_id in run_ids:
                place.append(run_id)
            store.hangs_for = 20.0
            hanging = asyncio.create_task(sealer.seal())
            waited = []
            while not hanging.done():
                for run_id in run_ids:
                    began = time.monotonic()
                    await asyncio.to_thread(place.append, run_id)
                    waited.append(time.monotonic() - began)
            with pytest.raises(AnchorUnavailable, match=r"not answered within 0\.7 s"):
                await hanging
            assert max(waited) < 0.7
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
            for _ in range(3):  # more of them than there are threads for everybody
                with pytest.raises(AnchorUnavailable):
                    await sealer.seal()
            assert await asyncio.wait_for(asyncio.to_thread(place.unsealed), 0.7) == sorted(run_ids)
            store.hangs_for = 0.0
            async with asyncio.timeout(20):  # until the call that hangs is over
                while place.unsealed():
                    with suppress(AnchorUnavailable):
                        await sealer.seal()
            assert place.pending() == []
            assert len(store.objects) == len(place.stored()) == 2

    play(database_url, tmp_path, scenario)


def settings_with(database_url: str, **fields: Any) -> Settings:
    return Settings(database_url=SecretStr(database_url), redis_url=SecretStr("redis://127.0.0.1:1"), **fields)


def test_without_a_key_there_is_no_sealer_and_one_line_says_so(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(database_url, pool_size=1, application_name="test")
    with caplog.at_level(logging.INFO, "worker.sealer"):
        assert open_sealer(settings_with(database_url), engine) is None
    assert [record.message for record in caplog.records] == ["the audit is not sealed: AUDIT_SIGNING_KEY is not set"]


@pytest.mark.parametrize("wrong", ["secret words", public_key_pem(new_private_key_pem())])
def test_a_wrong_key_is_a_wrong_setting_and_never_quoted(database_url: str, wrong: str) -> None:
    engine = make_engine(database_url, pool_size=1, application_name="test")
    with pytest.raises(ConfigurationError, match="AUDIT_SIGNING_KEY is malformed: it is not an Ed25519") as caught:
        open_sealer(settings_with(database_url, audit_signing_key=SecretStr(wrong)), engine)
    assert wrong not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_worker_with_a_wrong_key_does_not_start(stack: Stack) -> None:
    worker = stack.another_worker("wrong-key", AUDIT_SIGNING_KEY="secret words")
    worker.spawn()
    assert worker.wait(20) == 2
    log = worker.log.read_text()
    assert "AUDIT_SIGNING_KEY" in log
    assert "secret words" not in log


def test_a_worker_seals_by_itself_as_soon_as_it_has_started(
    stack: Stack, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(APPEND, [uuid4()])
    path = tmp_path / "anchor" / "checkpoints.jsonl"
    worker = stack.another_worker("sealing", DATABASE_URL=database_url, REDIS_URL=redis_url, AUDIT_ANCHOR=str(path))
    try:
        worker.start()
        stack.until(lambda: list(FileAnchor(path).read()))
    finally:
        worker.stop()
    [checkpoint] = FileAnchor(path).read()
    assert checkpoint.is_signed_by(load_public_key(stack.audit_public_key.read_text()))
    assert '"event": "audit sealed"' in worker.log.read_text()


def test_a_worker_stops_in_time_while_its_object_store_hangs(stack: Stack, database_url: str, redis_url: str) -> None:
    with an_object_store() as store:
        store.hangs_for = 60.0
        env = {**store.env(), "DATABASE_URL": database_url, "REDIS_URL": redis_url, "AUDIT_ANCHOR": "s3://bucket/audit"}
        worker = stack.another_worker("hanging", **env)
        try:
            worker.start()
            time.sleep(1)
            began = time.monotonic()
        finally:
            worker.stop()
        assert time.monotonic() - began < 5


def test_the_development_stack_has_a_key_of_its_own_that_stays_private_and_the_same(stack: Stack) -> None:
    key = stack.directory / "audit-signing-key.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    assert (
        stack.sealing_env
        == stack.sealing_env
        == {
            "AUDIT_SIGNING_KEY": key.read_text(),
            "AUDIT_ANCHOR": str(stack.directory / "audit-checkpoints.jsonl"),
        }
    )
    assert stack.audit_public_key.read_text() == public_key_pem(key.read_text())
    assert "AUDIT_SIGNING_KEY" not in stack.env
