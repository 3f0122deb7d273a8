"""How this process ends: what SIGTERM and SIGINT ask for, and that it is gone in time whatever its event loop does.

Asked once, it drains: runs go on to their next commit and are handed back. Asked again, they are handed back at once.
Asked a third time, it is gone. A thread of its own hears the signals, because a wedged event loop hears none.
"""

import asyncio
import logging
import os
import select
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import NoReturn

logger = logging.getLogger(__name__)

EXIT_FORCED = 70
"""Exit code of a process that its event loop did not end."""
OVERTIME_SECONDS = 0.5
"""How long after `DRAIN_SECONDS` the process is ended from outside the event loop."""
HURRY_SECONDS = 3.0
"""The same, after it was asked again."""


class Ending:
    """`asked`: drain. `hurried`: wait for no run any more. Made in the main thread, where the event loop runs."""

    def __init__(self, *, drain_seconds: float) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._drain_seconds = drain_seconds
        self._asked_at: float | None = None
        self._gone_by: float | None = None
        self._heard, self._told = os.pipe()
        os.set_blocking(self._told, False)

    def listen(self) -> None:
        """From now on signals are obeyed."""
        # The interpreter writes a signal's number there right when it comes, also when the main thread is in the middle
        # of a call that blocks. It wants a handler of ours; that one only runs when the main thread gets round to it.
        signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _heard_elsewhere)
        threading.Thread(target=self._watch, name="ending", daemon=True).start()

    def ask(self) -> None:
        """End as if a signal had asked for it."""
        if self._asked_at is None:
            os.write(self._told, b"\0")

    @property
    def seconds_left(self) -> float:
        """Of `DRAIN_SECONDS`, counted from the first signal."""
        spent = 0.0 if self._asked_at is None else time.monotonic() - self._asked_at
        return max(0.0, self._drain_seconds - spent)

    def _watch(self) -> None:
        while True:
            left = None if self._gone_by is None else max(0.0, self._gone_by - time.monotonic())
            heard, _, _ = select.select([self._heard], [], [], left)
            if not heard:
                end_now("not at rest in time; what is still held goes on when its lease expires")
            for number in os.read(self._heard, 64):
                self._obey(signal.Signals(number).name if number else None)

    def _obey(self, name: str | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._gone_by = now + self._drain_seconds + OVERTIME_SECONDS
            self._set(self.asked)
            report(logging.INFO, "asked to stop", signal=name)
        elif not self.hurried.is_set():
            assert self._gone_by is not None
            self._gone_by = min(self._gone_by, now + HURRY_SECONDS)
            self._set(self.hurried)
            report(logging.WARNING, "asked to stop again: runs are handed back at once", signal=name)
        else:
            end_now("asked to stop a third time: what is still held goes on when its lease expires", signal=name)

    def _set(self, event: asyncio.Event) -> None:
        with suppress(RuntimeError):  # the loop has ended before us
            self._loop.call_soon_threadsafe(event.set)


def end_now(why: str, **fields: object) -> NoReturn:
    """End the process from outside its event loop. From any thread."""
    report(logging.ERROR, why, **fields)
    os._exit(EXIT_FORCED)


def report(level: int, event: str, **fields: object) -> None:
    """Log, but wait no longer than a second for it: standard error may be the very thing that the process hangs on."""
    words = threading.Thread(
        target=logger.log, args=(level, event), kwargs={"extra": {"fields": fields}}, daemon=True, name="report"
    )
    words.start()
    words.join(1.0)


def _heard_elsewhere(_number: int, _frame: FrameType | None) -> None:
    """A signal's handler in the main thread: `Ending` has heard it already."""
