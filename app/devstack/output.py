"""What the processes of a stack write, on one terminal: every line with the name of its process."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from app.devstack.processes import Process
from app.devstack.terminal import coloured, readable

_COLOURS = ("36", "32", "35", "33", "34")
_INTERVAL_SECONDS = 0.1


@contextmanager
def shown(processes: Iterable[Process]) -> Iterator[None]:
    """Print what the processes write from now on, for the length of the block."""
    ended = threading.Event()
    followers = [_Follower(process, _COLOURS[index % len(_COLOURS)]) for index, process in enumerate(processes)]

    def follow() -> None:
        while True:
            last_time = ended.wait(_INTERVAL_SECONDS)
            for follower in followers:
                follower.print_new()
            if last_time:
                return

    thread = threading.Thread(target=follow, name="output", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Follower:
    """Prints the whole lines that a process has added to its log."""

    def __init__(self, process: Process, colour: str) -> None:
        self._process = process
        self._prefix = coloured(f"{process.name:<8}│ ", colour)
        self._position = 0

    def print_new(self) -> None:
        if not self._process.was_started:
            return
        with self._process.log.open("rb") as log:
            log.seek(self._position)
            whole, newline, _ = log.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        if newline:
            for line in whole.decode(errors="replace").splitlines():
                print(self._prefix + readable(line), flush=True)
