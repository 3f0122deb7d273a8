"""One stack in one directory: a lock that the system takes back however its holder ends."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from app.devstack.processes import ProcessFailed

_TIDYING_SECONDS = 10.0


@contextmanager
def exclusive(directory: Path) -> Iterator[int]:
    """Hold `lock` in the directory for the length of the block. Gives its file descriptor, for the reaper to hold too.

    Raises `ProcessFailed` where another stack holds it. One that was killed holds it until its reaper is through: that
    is waited for.
    """
    path = directory / "lock"
    until = time.monotonic() + _TIDYING_SECONDS
    while (descriptor := _try(path)) is None:
        holder = _holder(path)
        if time.monotonic() > until or (holder is not None and _is_alive(holder)):
            raise ProcessFailed(f"a stack is running already in {directory}" + (f" (pid {holder})" if holder else ""))
        time.sleep(0.1)
    try:
        os.write(descriptor, str(os.getpid()).encode())
        yield descriptor
    finally:
        path.unlink()
        os.close(descriptor)


def is_held(directory: Path) -> bool:
    """Does a stack, or the reaper of one that was killed, hold the lock of this directory?"""
    descriptor = _try(directory / "lock")
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def _try(path: Path) -> int | None:
    """Take the lock if it is free."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it before us may have removed the file in the meantime: then somebody else can lock a new one.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            os.truncate(descriptor, 0)
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        return None
    os.close(descriptor)
    return None


def _holder(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
