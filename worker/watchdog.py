"""Sees from outside when the event loop no longer turns: a tool that blocks it, an endless computation.

Nothing else in the process can tell then, because everything else is on that loop. The leases of its runs expire and
other workers take the runs over; this says which line the loop hangs on, and at last ends the process.
"""

import asyncio
import logging
import sys
import threading
import time
import traceback

from worker.ending import end_now, report

BEAT_SECONDS = 0.25
TICK_SECONDS = 0.5
WEDGED_SECONDS = 10.0
"""A loop that is silent for so long is wedged: the worker no longer calls itself alive."""


class Watchdog:
    """Made in the event loop's thread. `ends_after`: seconds of silence after which the process ends itself.

    Silence is counted in ticks of the watching thread, not by the clock, so that a process that was frozen as a whole
    (SIGSTOP, a laptop asleep) does not find itself wedged when it wakes up.
    """

    def __init__(self, *, ends_after: float) -> None:
        self.silence = 0.0
        """For how many seconds the event loop has given no sign of life."""
        self._ends_after = ends_after
        self._beats = 0
        self._loop_thread = threading.get_ident()

    async def beat(self) -> None:
        """The event loop's sign of life, for ever."""
        while True:
            self._beats += 1
            await asyncio.sleep(BEAT_SECONDS)

    def start(self) -> None:
        """Watch, in a thread that ends with the process."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        seen = self._beats
        while True:
            time.sleep(TICK_SECONDS)
            if self._beats != seen:
                if self.silence >= WEDGED_SECONDS:
                    report(logging.WARNING, "the event loop turns again", silent_seconds=self.silence)
                seen, self.silence = self._beats, 0.0
                continue
            was, self.silence = self.silence, self.silence + TICK_SECONDS
            if was < WEDGED_SECONDS <= self.silence:
                report(logging.ERROR, "the event loop is wedged", silent_seconds=self.silence, stack=self._stack())
            if self.silence >= self._ends_after:
                end_now("the event loop stays wedged; its runs have been taken over", silent_seconds=self.silence)

    def _stack(self) -> str:
        """What the event loop's thread is doing."""
        return "".join(traceback.format_stack(sys._current_frames()[self._loop_thread]))
