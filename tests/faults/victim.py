"""The process that comes to an armed failpoint, and what happens to it then."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from app.devstack.processes import Process
from tests.faults.failpoints import FREEZE, KILL, Failpoint
from tests.faults.rig import DRAIN_SECONDS, LEASE_SECONDS, Rig


class Victim:
    """Killed, it is started again, as the platform does; the API, frozen, is resumed after a while."""

    def __init__(self, rig: Rig, failpoint: Failpoint, action: str) -> None:
        self._rig = rig
        self._failpoint = failpoint
        self._action = action
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self.process: Process | None = None

    def _watch(self) -> None:
        while (pid := self._failpoint.victim) is None:
            time.sleep(0.01)
        self.process = process = self._rig.process_of(pid)
        if self._action == KILL:
            process.wait(5)
            process.start()
        elif process is self._rig.api:
            time.sleep(LEASE_SECONDS + 1)
            process.resume()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The failpoint is armed, and has to be reached."""
        self._failpoint.arm(self._action)
        self._watcher.start()
        try:
            yield
            self._watcher.join(20)
            assert self.process is not None, "nobody came to the failpoint"
        finally:
            self._failpoint.disarm()

    def awake(self) -> None:
        """Let it go on where it was frozen, and give it the time to do harm."""
        if self._action == FREEZE and self.process is not None:
            self.process.resume()
            time.sleep(LEASE_SECONDS / 2)

    def gone(self) -> None:
        """Wait until it has ended, as it was told to before it came to the failpoint."""
        if self._action == FREEZE and self.process is not None:
            self.process.wait(DRAIN_SECONDS + 5)
