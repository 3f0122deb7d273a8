"""Puts right what a crash or a lost message left behind. Runs in every worker, in one of them at a time.

Each sweep: runs past their deadline are failed; runs whose lease is over are queued again (or failed, after
`max_attempts`); reviews nobody decided expire; queued runs that Redis does not know are enqueued, and what it still
believes to be in execution, and is not, is forgotten. It reads Postgres, so a flushed Redis is filled again from there.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.background import within
from app.db import expiry, rescue, sweep
from app.db.engine import transactional
from app.db.sweep import Queued
from app.domain.errors import QueueUnavailable
from app.queue import RunQueue
from app.signals import CANCELLED, RESTED, Signals
from worker.metrics import Rescue, WorkerMetrics

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 2.0
DEADLINE_GRACE_SECONDS = 5.0
"""How far past its deadline a run may be before it is taken from a worker that should have ended it."""
COMPARE_SECONDS = 30.0
"""How often all queued runs are compared with what Redis knows, also when nothing gives reason to."""
SHORT_QUEUE = 1_000
"""Up to here Redis has to know as many runs as Postgres; where more are queued, the next comparison is soon enough."""
BATCH = 1_000
"""Runs in one statement, and in one go to Redis."""
SIGNAL_SECONDS = 1.0
"""How long a sweep is held up by telling others what it has ended; whoever is not told asks Postgres later."""
LOCK_IDLE_SECONDS = 5.0
"""A sweeper that does nothing for so long is frozen, and another one may sweep."""
_FIRST = UUID(int=0)


class Sweeper:
    """One per worker process; an advisory lock picks the one that sweeps."""

    def __init__(self, engine: AsyncEngine, queue: RunQueue, signals: Signals, metrics: WorkerMetrics) -> None:
        self._engine = engine
        self._transactional = transactional(engine)
        self._queue = queue
        self._signals = signals
        self._metrics = metrics

    async def keep_sweeping(self) -> None:
        """Sweep for ever; what fails is tried again in the next sweep."""
        while True:
            try:
                await self.sweep()
            except (SQLAlchemyError, QueueUnavailable) as error:
                logger.warning("sweep failed", extra={"fields": {"error": str(error)}})
            await asyncio.sleep(SWEEP_SECONDS)

    async def sweep(self) -> None:
        """One sweep; does nothing while another process is at it.

        Raises `QueueUnavailable` when Redis is away: the runs are safe in Postgres and found by the next sweep.
        """
        async with self._transactional.begin() as lock:
            if not await sweep.try_lock(lock, idle_seconds=LOCK_IDLE_SECONDS):
                return
            while await self._put_right(lock):
                pass
            await self._forget_rested(lock)
            if await self._may_miss_runs(lock):
                await self._refill(lock)

    async def _put_right(self, lock: AsyncConnection) -> bool:
        """End and queue what nobody else does any more. True: more is left to do than was done in one go."""
        async with self._engine.connect() as connection:
            overdue = await rescue.end_overdue(connection, grace_seconds=DEADLINE_GRACE_SECONDS, limit=BATCH)
            self._metrics.runs_rescued(Rescue.OVERDUE, len(overdue))
            requeued, given_up = await rescue.rescue_expired(connection, limit=BATCH)
            self._metrics.runs_rescued(Rescue.REQUEUED, len(requeued))
            self._metrics.runs_rescued(Rescue.GIVEN_UP, len(given_up))
        async with self._transactional.begin() as connection:
            expired = await expiry.expire_due(connection, limit=BATCH)
        # failpoint: after_rescue
        if expired.reviews:
            fields = {"reviews": expired.reviews, "ended": len(expired.ended), "queued": len(expired.queued)}
            logger.info("reviews were not decided in time", extra={"fields": fields})
        if overdue or requeued or given_up:
            fields = {"overdue": len(overdue), "requeued": len(requeued), "given_up": len(given_up)}
            logger.warning("runs were not ended by their workers", extra={"fields": fields})
        await self._publish(CANCELLED, overdue)
        await self._publish(RESTED, [*overdue, *given_up, *expired.ended])
        marked = await sweep.marked_for_enqueue(lock, limit=BATCH)
        are_left = await self._put_back(marked) > 0 and len(marked) == BATCH
        return are_left or expired.reviews >= BATCH

    async def _forget_rested(self, lock: AsyncConnection) -> None:
        """Let Redis forget runs that came to rest, in a worker that died before it could say so or broke after that."""
        if begun := await asyncio.to_thread(self._queue.begun_ids):
            rested = await sweep.at_rest(lock, begun)
            if rested:
                await asyncio.to_thread(self._queue.forget, rested)

    async def _may_miss_runs(self, lock: AsyncConnection) -> bool:
        """Is there reason to compare? Cheap, however many runs are queued."""
        waiting = await sweep.count_queued(lock, limit=SHORT_QUEUE)
        if waiting == 0:
            return False
        if waiting > await asyncio.to_thread(self._queue.length):
            return True
        return not await asyncio.to_thread(self._queue.is_complete)

    async def _refill(self, lock: AsyncConnection) -> None:
        """Put back what Redis does not know, oldest first. Between two batches, leases are rescued.

        Redis counts as complete only where nothing was missing: it may be flushed while it is filled.
        """
        known = await asyncio.to_thread(self._queue.known_ids)
        missing = await sweep.missing(lock, known, after=_FIRST, limit=BATCH)
        if not missing:
            await asyncio.to_thread(self._queue.note_complete, COMPARE_SECONDS)
        while missing:
            await self._put_back(missing)
            await self._put_right(lock)
            missing = await sweep.missing(lock, known, after=missing[-1].id, limit=BATCH)

    async def _put_back(self, runs: Sequence[Queued]) -> int:
        """Enqueue them and take their marks away. Returns how many had one."""
        if not runs:
            return 0
        logger.info("enqueueing runs that were left behind", extra={"fields": {"runs": len(runs)}})
        await asyncio.to_thread(self._queue.put_back, [(run.id, run.priority) for run in runs])
        # failpoint: before_unmark
        async with self._engine.connect() as connection:
            return await sweep.unmark(connection, runs)

    async def _publish(self, channel: str, run_ids: Sequence[UUID]) -> None:
        async def publish_all() -> None:
            for run_id in run_ids:
                await self._signals.publish(channel, run_id)

        with suppress(TimeoutError):
            await within(SIGNAL_SECONDS, publish_all())
