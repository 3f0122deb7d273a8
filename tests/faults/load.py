"""Runs that keep coming while things go wrong."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from tests.faults.rig import SCENARIO, Rig


class Load:
    """Submits runs from several threads and keeps about `open_runs` of them open; decides what they ask people."""

    def __init__(self, rig: Rig, *, open_runs: int, submitters: int = 4) -> None:
        self._rig = rig
        self._open_runs = open_runs
        self._stopping = threading.Event()
        self._room = threading.Event()
        self._threads = [threading.Thread(target=self._submit, daemon=True) for _ in range(submitters)]
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self.accepted: list[str] = []
        """What a 202 was given for."""
        self.failures: list[BaseException] = []

    @contextmanager
    def coming(self) -> Iterator[None]:
        """For the length of the block."""
        for thread in (self._keeper, *self._threads):
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            self._room.set()
            for thread in (self._keeper, *self._threads):
                thread.join(60)
        assert not self.failures, self.failures

    def _submit(self) -> None:
        try:
            while not self._stopping.is_set():
                self._room.wait()
                if not self._stopping.is_set():
                    self.accepted += self._rig.submit(1, text=SCENARIO)
        except BaseException as error:
            self.failures.append(error)
            raise

    def _keep(self) -> None:
        """Make room for more as runs end, and be the person whom they ask."""
        looked_at = 0
        unsettled: set[str] = set()
        while not self._stopping.is_set():
            time.sleep(0.2)
            accepted = self.accepted
            unsettled |= set(accepted[looked_at : (looked_at := len(accepted))])
            try:
                found = self._rig.open_of(sorted(unsettled))
                for run_id in [run_id for run_id, status in found.items() if status == "waiting"]:
                    self._rig.decide(run_id)
            except psycopg.OperationalError:  # Postgres is away, which is the point
                continue
            unsettled = set(found)
            if len(unsettled) < self._open_runs:
                self._room.set()
            else:
                self._room.clear()
