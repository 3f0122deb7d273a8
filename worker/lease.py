"""The leases of this process: one statement extends them all; a run whose lease is gone is stopped at once."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from types import TracebackType
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.background import within
from app.db import leases
from app.domain.errors import LeaseLost
from app.domain.run import Claim
from worker.metrics import WorkerMetrics

logger = logging.getLogger(__name__)

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Goes on while the process is frozen and, where the system has such a clock, while the machine sleeps."""

LOOK_SECONDS = 1.0
"""How long a run that was given up may hold its slot while Postgres is asked why."""


def local_now() -> float:
    """Seconds on this machine's clock, by which a worker may give a lease up, but never assume that it has one."""
    return time.clock_gettime(_CLOCK)


class Interruption(Enum):
    """Why the task of a run was cancelled from outside."""

    LOST = auto()
    """The run is somebody else's, or has ended: write nothing."""
    DRAIN = auto()
    """This worker goes away: hand it back."""


@dataclass(slots=True)
class Held:
    """A run in execution here."""

    claim: Claim
    task: "asyncio.Task[object]"
    sure_until: float
    """Until then (`local_now`) nobody can have taken the run over: the lease, counted from before it was asked for."""
    interruption: Interruption | None = None

    def sure_for(self) -> float:
        """For how many seconds the lease is certainly still ours. 0 after the length of a lease in a freeze, or without
        Postgres.
        """
        return 0.0 if self.interruption is Interruption.LOST else max(0.0, self.sure_until - local_now())

    def interrupt(self, why: Interruption) -> None:
        """Cancel the task, once."""
        if self.interruption is None:
            self.interruption = why
            self.task.cancel()


class WhileSure:
    """A block that is left with `LeaseLost` once the lease is not certainly ours any more; before it begins, too.

    `sure_for`: for how many seconds it is, asked again whenever these are over.
    """

    def __init__(self, sure_for: Callable[[], float]) -> None:
        self._sure_for = sure_for
        self._is_over = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        if (left := self._sure_for()) <= 0:
            raise LeaseLost("not begun: the lease may be somebody else's")
        self._look_in(left)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._is_over and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise LeaseLost("cut off: the lease may be somebody else's") from error

    def _look_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        if (left := self._sure_for()) > 0:
            self._look_in(left)
        else:
            self._is_over = True
            self._task.cancel()


@dataclass(slots=True)
class Leases:
    """All runs in execution here, and the heartbeat that keeps them ours."""

    engine: AsyncEngine
    lease_seconds: float
    metrics: WorkerMetrics
    held: dict[UUID, Held] = field(default_factory=dict)

    async def keep(self) -> None:
        """Extend all leases four times in a lease's length, for ever."""
        while True:
            await asyncio.sleep(self.lease_seconds / 4)
            try:
                await within(self.lease_seconds / 4, self.extend())
            except (SQLAlchemyError, TimeoutError) as error:
                # Postgres away: nobody can take the runs over either. If they are, fencing keeps us from writing.
                logger.warning("heartbeat failed", extra={"fields": {"error": str(error)}})

    async def extend(self) -> None:
        """One heartbeat. Runs that are not ours any more are interrupted."""
        tokens = {run_id: held.claim.token for run_id, held in self.held.items()}
        if not tokens:
            return
        began = local_now()
        # failpoint: before_heartbeat
        async with self.engine.connect() as connection:
            kept = await leases.extend(connection, tokens, lease_seconds=self.lease_seconds)
        # failpoint: after_heartbeat
        for run_id, token in tokens.items():
            held = self.held.get(run_id)
            if held is None or held.claim.token != token:  # at rest, or claimed anew meanwhile
                continue
            if run_id not in kept:
                held.interrupt(Interruption.LOST)
            elif kept[run_id]:
                held.sure_until = began + self.lease_seconds

    async def count_loss(self, run_id: UUID) -> None:
        """A run was given up here, because of a heartbeat or a write that found it gone, or a lease that is not sure.

        A cancellation looks the same, but is no loss: its signal may come late, or never.
        """

        async def is_cancelled() -> bool:
            async with self.engine.connect() as connection:
                return await leases.is_cancelled(connection, run_id)

        with suppress(SQLAlchemyError, TimeoutError):
            if await within(LOOK_SECONDS, is_cancelled()):
                return
        self.metrics.lease_lost()

    def drop(self, run_id: UUID) -> None:
        """The run is not ours any more: stop it here, if it is here."""
        if held := self.held.get(run_id):
            held.interrupt(Interruption.LOST)
