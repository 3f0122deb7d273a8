"""Where checkpoints are kept: nothing is lost, doubled or overwritten, whatever crashes or races."""

import fcntl
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import app.anchor
from app.anchor import Anchor, FileAnchor, ObjectStoreAnchor, open_anchor
from app.audit.proof import Checkpoint, Leaf, make_checkpoint
from app.domain.errors import AnchorConflict, AnchorUnavailable, ConfigurationError
from tests.object_store import ObjectStore, an_object_store

KEY = Ed25519PrivateKey.generate()
NOW = datetime(2025, 1, 1, tzinfo=UTC)


def checkpoints(how_many: int, *, key: Ed25519PrivateKey = KEY) -> list[Checkpoint]:
    made: list[Checkpoint] = []
    for number in range(how_many):
        leaf = Leaf(UUID(int=number), 1, bytes(32))
        made.append(make_checkpoint([leaf], previous=made[-1] if made else None, at=NOW, key=key))
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints.jsonl"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with an_object_store() as store:
        for name, value in store.env().items():
            monkeypatch.setenv(name, value)
        yield store


@pytest.fixture(params=["file", "object store"])
def anchor(request: pytest.FixtureRequest, tmp_path: Path) -> Anchor:
    if request.param == "file":
        return open_anchor(str(tmp_path / "new" / "folders" / "checkpoints.jsonl"))
    request.getfixturevalue("store")
    return open_anchor("s3://bucket/some/place")


def test_what_was_appended_is_read_in_order_from_any_number_on(anchor: Anchor) -> None:
    made = checkpoints(30)
    assert list(anchor.read()) == list(anchor.read(7)) == []
    for checkpoint in made:
        anchor.append(checkpoint)
    for since in (1, 2, 9, 29, 30, 31, 99):
        assert list(anchor.read(since)) == made[since - 1 :]


def test_the_same_checkpoint_again_changes_nothing_and_another_one_is_refused(anchor: Anchor) -> None:
    made, others = checkpoints(3), checkpoints(3, key=Ed25519PrivateKey.generate())
    for checkpoint in [*made, *reversed(made)]:
        anchor.append(checkpoint)
    for other in others:
        with pytest.raises(AnchorConflict, match=f"another checkpoint {other.number} "):
            anchor.append(other)
    assert list(anchor.read()) == made


def test_a_checkpoint_differs_also_by_its_signature_alone(anchor: Anchor) -> None:
    [checkpoint] = checkpoints(1)
    anchor.append(checkpoint)
    with pytest.raises(AnchorConflict):
        anchor.append(Checkpoint(checkpoint.body, bytes(64)))


def test_each_checkpoint_is_one_line_of_json(path: Path) -> None:
    first, second = checkpoints(2)
    FileAnchor(path).append(first)
    FileAnchor(path).append(second)
    assert path.read_text() == first.line + second.line
    assert Checkpoint.of_line(first.line) == first


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: whole[:-1], id="the end of the line is missing"),
        pytest.param(lambda whole: whole[:-40], id="half a line"),
        pytest.param(lambda whole: whole[:-200] + bytes(200), id="a line of nothing, as after a power cut"),
    ],
)
def test_a_line_torn_by_a_crash_costs_no_other_line(path: Path, damage: Callable[[bytes], bytes]) -> None:
    made = checkpoints(3)
    anchor = FileAnchor(path)
    for checkpoint in made[:2]:
        anchor.append(checkpoint)
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    for checkpoint in made[1:]:  # the second was never noted as kept, so it comes again
        anchor.append(checkpoint)
    assert list(anchor.read()) == made
    assert list(anchor.read(2)) == made[1:]
    assert path.read_bytes().startswith(before)  # nothing is taken away, so a file that only grows will do


def test_lines_that_are_no_checkpoints_are_left_out(path: Path) -> None:
    made = checkpoints(2)
    odd = [
        "",
        "{}",
        "[]",
        "null",
        '{"body": 1, "signature": ""}',
        '{"body": "{}", "signature": "!"}',
        "\ufeff",
        "é" * 9000,
    ]
    text = "\n".join([made[0].line.strip(), *odd, made[1].line.strip(), *odd]) + "\n"
    path.write_text(text)
    assert list(FileAnchor(path).read()) == made
    assert list(FileAnchor(path).read(2)) == made[1:]
    FileAnchor(path).append(made[1])
    assert path.read_text() == text


def test_the_end_of_a_long_file_is_read_without_the_rest(path: Path) -> None:
    made = checkpoints(2000)
    path.write_text("".join(checkpoint.line for checkpoint in made))
    anchor = FileAnchor(path)
    assert list(anchor.read(1990)) == made[1989:]
    began = time.perf_counter()
    for _ in range(20):
        assert [one.number for one in anchor.read(2000)] == [2000]
    assert (time.perf_counter() - began) / 20 < 0.005
    assert list(anchor.read()) == made


def append_all(path: str) -> None:
    for checkpoint in checkpoints(40, key=Ed25519PrivateKey.from_private_bytes(bytes(32))):
        FileAnchor(Path(path)).append(checkpoint)


def test_processes_that_share_a_file_write_each_checkpoint_once(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_all, args=[str(path)]) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [Checkpoint.of_line(line).number for line in path.read_text().splitlines()] == list(range(1, 41))


def test_a_process_that_does_not_let_go_of_the_file_is_not_waited_for_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.anchor, "FILE_LOCK_SECONDS", 0.2)
    [checkpoint] = checkpoints(1)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(AnchorUnavailable):
            FileAnchor(path).append(checkpoint)
        with pytest.raises(AnchorUnavailable):
            list(FileAnchor(path).read())
    FileAnchor(path).append(checkpoint)
    assert list(FileAnchor(path).read()) == [checkpoint]


def test_what_is_appended_is_on_the_disk_and_so_is_a_new_files_name(path: Path) -> None:
    """Seen from outside: the system calls of a process that appends twice."""
    script = (
        "import os, sys, pathlib, tests.unit.test_anchor as t; from app.anchor import FileAnchor\n"
        "synced = []; real = os.fsync\n"
        "os.fsync = lambda fd: (synced.append(os.readlink(f'/proc/self/fd/{fd}')), real(fd))\n"
        "[FileAnchor(pathlib.Path(sys.argv[1])).append(one) for one in t.checkpoints(2)]\n"
        "print(*synced, sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(path), str(path.parent), str(path)]


def test_a_file_that_cannot_be_written_is_told_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    [checkpoint] = checkpoints(1)
    with pytest.raises(AnchorUnavailable, match=r"file/below: (Not a directory|File exists)"):
        FileAnchor(tmp_path / "file" / "below").append(checkpoint)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(AnchorUnavailable, match="No space left"):
        FileAnchor(full).append(checkpoint)


def test_an_object_has_a_name_that_sorts_and_is_put_only_where_there_is_none(store: ObjectStore) -> None:
    made = checkpoints(2)
    anchor = open_anchor("s3://bucket/some/place/")
    for checkpoint in [*made, *made]:
        anchor.append(checkpoint)
    assert store.objects == {
        "bucket/some/place/000000000001.json": made[0].line.encode(),
        "bucket/some/place/000000000002.json": made[1].line.encode(),
    }
    assert store.puts == 2


def test_a_bucket_may_be_used_without_a_path_and_hold_other_things(store: ObjectStore) -> None:
    mine, other = checkpoints(2)
    anchor = open_anchor("s3://bucket")
    store.objects |= {
        "bucket/readme.txt": b"hello",
        "bucket/000000000002.json": b"damaged",
        "bucket/000000000003.json": other.line.encode(),
        "bucket/elsewhere/000000000002.json": other.line.encode(),
    }
    anchor.append(mine)
    assert list(anchor.read()) == [mine]


def test_a_put_whose_answer_was_lost_is_found_done(store: ObjectStore) -> None:
    [checkpoint] = checkpoints(1)
    store.forgets_to_answer = 1
    anchor = open_anchor("s3://bucket/place")
    try:
        anchor.append(checkpoint)
    except AnchorUnavailable:
        anchor.append(checkpoint)
    assert store.puts == 1
    assert list(anchor.read()) == [checkpoint]


@pytest.mark.parametrize("status", [403, 500])
def test_a_store_that_refuses_is_told_in_one_line_without_its_credentials(store: ObjectStore, status: int) -> None:
    store.refuses = status
    anchor = open_anchor("s3://bucket/place")
    for call in (lambda: anchor.append(checkpoints(1)[0]), lambda: list(anchor.read())):
        with pytest.raises(AnchorUnavailable, match="s3://bucket/place: ") as caught:
            call()
        assert "\n" not in str(caught.value)
        assert store.env()["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    store.refuses = None
    anchor.append(checkpoints(1)[0])


def test_a_store_that_hangs_is_given_up(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.anchor, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(app.anchor, "RETRY_SECONDS", 0.5)
    store.hangs_for = 5
    began = time.monotonic()
    with pytest.raises(AnchorUnavailable):
        open_anchor("s3://bucket/place").append(checkpoints(1)[0])
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "where", ["https://example.com/x", "s3:///x", "s3://", "file:///x", "ftp://x", "a\0b", "az://b/c"]
)
def test_an_anchor_that_cannot_be_is_a_wrong_setting(where: str) -> None:
    with pytest.raises(ConfigurationError, match="AUDIT_ANCHOR") as caught:
        open_anchor(where)
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="AUDIT_ANCHOR"):
        open_anchor(str(tmp_path))


def test_the_large_clouds_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert isinstance(open_anchor("az://container/place"), ObjectStoreAnchor)
    assert isinstance(open_anchor("gs://bucket/place"), ObjectStoreAnchor)


def test_a_file_needs_no_object_stores_library() -> None:
    script = "import sys; from app.anchor import open_anchor; open_anchor('x.jsonl'); print('obstore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_file_is_the_workers_to_read_and_write(path: Path) -> None:
    FileAnchor(path).append(checkpoints(1)[0])
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    assert not stat.S_IMODE(path.stat().st_mode) & 0o111
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208 - nothing else is left there
