"""Where the audit's checkpoints are kept outside of the database, so that it cannot be rewritten unseen.

A file (one line of JSON for each checkpoint) or an object store (one object for each). Neither is ever overwritten.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Protocol

from app.audit.proof import Checkpoint
from app.domain.errors import AnchorConflict, AnchorUnavailable, ConfigurationError

SCHEMES = ("s3://", "gs://", "az://")
FILE_LOCK_SECONDS = 5.0
"""How long another process may be writing to the file."""
REQUEST_SECONDS = 5.0
RETRY_SECONDS = 5.0
"""How long the object store's client tries one request, and goes on with further tries."""
BLOCK = 4096
"""Bytes at the end of a file that are looked at first."""
READERS = 16
"""Objects that are fetched at a time."""
_OBJECT_NAME = re.compile(r"\d{12}\.json")


class Anchor(Protocol):
    """All of it blocks: on a disk, or on a network for `REQUEST_SECONDS` and `RETRY_SECONDS`. What cannot be read as a
    checkpoint is left out, so its number is missing.
    """

    def append(self, checkpoint: Checkpoint) -> None:
        """Keep it for ever; nothing happens where it is kept already.

        Raises `AnchorUnavailable`, and `AnchorConflict` where another one is kept under its number.
        """

    def read(self, since: int = 1) -> Iterator[Checkpoint]:
        """Those from this number on, in order. Raises `AnchorUnavailable`."""


def open_anchor(where: str) -> Anchor:
    """What `AUDIT_ANCHOR` names. Raises `ConfigurationError`."""
    if where.startswith(SCHEMES):
        return ObjectStoreAnchor(where)
    if "://" in where or "\0" in where:
        raise ConfigurationError("AUDIT_ANCHOR is malformed: must be a file, or begin with s3://, gs:// or az://")
    path = Path(where)
    if path.is_dir():
        raise ConfigurationError("AUDIT_ANCHOR is malformed: it is a directory, not a file")
    return FileAnchor(path)


class FileAnchor:
    """JSON lines, only ever appended to; several processes of one host may share it.

    A crash can leave half a line at the end. The next line begins behind it: also where the file's attributes allow
    nothing but appending.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, checkpoint: Checkpoint) -> None:
        with self._refusals():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file, _locked(file, fcntl.LOCK_EX):
                size = _size(file)
                kept = next(_read(file, size, checkpoint.number), None)
                if kept and kept.number == checkpoint.number:
                    _expect_same(checkpoint, kept, self._path)
                else:
                    file.write((b"" if _ends_a_line(file, size) else b"\n") + checkpoint.line.encode())
                    file.flush()
                os.fsync(file.fileno())  # also of what another process wrote, that may have died before it did this
                if not size:
                    _sync_directory(self._path.parent)

    def read(self, since: int = 1) -> Iterator[Checkpoint]:
        with self._refusals():
            try:
                file = self._path.open("rb")
            except FileNotFoundError:
                return
            with file:
                with _locked(file, fcntl.LOCK_SH):
                    size = _size(file)  # what is written from now on lies behind it
                yield from _read(file, size, since)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AnchorUnavailable(f"{self._path}: {error.strerror or error}") from error


class ObjectStoreAnchor:
    """One object for each checkpoint, named by its number, which the store is told never to overwrite.

    Credentials, region and endpoint come from the environment, by the names that the provider's own tools use.
    """

    def __init__(self, url: str) -> None:
        import obstore.store  # noqa: PLC0415 - only where it is used: it takes memory and time
        from obstore.exceptions import BaseError  # noqa: PLC0415

        self._url = url
        self._errors = (BaseError, OSError, ValueError)
        try:
            self._store = obstore.store.from_url(
                url,
                # Without TLS only where an address in the environment says http://.
                client_options={"timeout": timedelta(seconds=REQUEST_SECONDS), "allow_http": True},
                retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
            )
        except self._errors as error:
            raise ConfigurationError(f"AUDIT_ANCHOR is malformed: {_first_line(error)}") from None

    def append(self, checkpoint: Checkpoint) -> None:
        from obstore.exceptions import AlreadyExistsError  # noqa: PLC0415

        name = _object_name(checkpoint.number)
        with self._refusals():
            try:
                self._store.put(name, checkpoint.line.encode(), mode="create")
            except AlreadyExistsError:
                kept = self._get(name)
            else:
                return
        _expect_same(checkpoint, kept, f"{self._url}: {name}")

    def read(self, since: int = 1) -> Iterator[Checkpoint]:
        with ThreadPoolExecutor(READERS, thread_name_prefix="anchor-read") as threads:
            for names in self._names(since):
                with self._refusals():
                    found = list(threads.map(self._get, names))
                yield from (checkpoint for checkpoint in found if checkpoint)

    def _names(self, since: int) -> Iterator[list[str]]:
        listed = self._store.list(offset=_object_name(since - 1))
        while True:
            with self._refusals():
                batch = next(listed, None)
            if batch is None:
                return
            yield sorted(entry["path"] for entry in batch if _OBJECT_NAME.fullmatch(entry["path"]))

    def _get(self, name: str) -> Checkpoint | None:
        content = bytes(self._store.get(name).bytes())
        checkpoint = _checkpoint_in(content)
        return checkpoint if checkpoint and _object_name(checkpoint.number) == name else None

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise AnchorUnavailable(f"{self._url}: {_first_line(error)}") from error


def _expect_same(checkpoint: Checkpoint, kept: Checkpoint | None, where: object) -> None:
    if kept != checkpoint:
        raise AnchorConflict(f"{where} holds another checkpoint {checkpoint.number} than the database")


def _object_name(number: int) -> str:
    return f"{number:012}.json"


def _read(file: IO[bytes], size: int, since: int) -> Iterator[Checkpoint]:
    place = _begin_of(file, size, since)
    file.seek(place)
    while place < size and (line := file.readline()):
        place += len(line)
        checkpoint = _checkpoint_in(line)
        if checkpoint and checkpoint.number >= since:
            yield checkpoint


def _begin_of(file: IO[bytes], size: int, since: int) -> int:
    """A place before all lines from this number on. Looks from the end, where the new ones are."""
    length = BLOCK
    while since > 1 and length < size:
        file.seek(size - length)
        file.readline()  # the rest of a line
        place = file.tell()
        checkpoint = _checkpoint_in(file.readline())
        if checkpoint and checkpoint.number < since:
            return place
        length *= 2
    return 0


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _ends_a_line(file: IO[bytes], size: int) -> bool:
    file.seek(max(size - 1, 0))
    return file.read(1) in (b"", b"\n")


def _checkpoint_in(line: bytes) -> Checkpoint | None:
    with suppress(ValueError):
        return Checkpoint.of_line(line)
    return None


@contextmanager
def _locked(file: IO[bytes], kind: int) -> Iterator[None]:
    """Raises `BlockingIOError` where others do not let go of it in time."""
    until = time.monotonic() + FILE_LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            break
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
