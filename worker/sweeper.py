"""Puts right what a crash or a lost message left behind. Runs in every worker, in one of them at a time.

Each sweep: runs whose lease is over are queued again (or failed, after `max_attempts`); reviews nobody decided expire;
queued runs that Redis does not know are enqueued. It reads Postgres, so a flushed Redis is filled again from there.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.db import leases, reviews, sweep
from app.db.engine import transactional
from app.domain.errors import QueueUnavailable
from app.domain.run import Priority
from app.queue import RunQueue
from app.signals import RESTED, Signals

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 2.0
COMPARE_SECONDS = 30.0
"""How often the queued runs are compared with Redis one by one, also when their numbers give no reason to."""
BATCH = 500
REFILL = 2_000
"""How many runs a sweep puts back into an emptied Redis, so that the next sweep can rescue leases in between."""


class Sweeper:
    """One per worker process; an advisory lock picks the one that sweeps."""

    def __init__(self, engine: AsyncEngine, queue: RunQueue, signals: Signals) -> None:
        self._engine = engine
        self._transactional = transactional(engine)
        self._queue = queue
        self._signals = signals
        self._next_comparison = 0.0

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
            if not await sweep.try_lock(lock):
                return
            async with self._engine.connect() as connection:
                requeued, ended = await leases.rescue_expired(connection, limit=BATCH)
                ended = [*ended, *await reviews.expire_due(connection, limit=BATCH)]
            for run_id in ended:
                await self._signals.publish(RESTED, run_id)
            await self._enqueue(requeued)
            await self._enqueue_forgotten()

    async def _enqueue_forgotten(self) -> None:
        async with self._engine.connect() as connection:
            marked = await sweep.marked_for_enqueue(connection, limit=BATCH)
        await self._enqueue(marked)
        async with self._engine.connect() as connection:
            waiting = await sweep.count_queued(connection)
        if waiting == 0:
            return
        is_due = time.monotonic() >= self._next_comparison
        if is_due or waiting > await asyncio.to_thread(self._queue.length):
            self._next_comparison = time.monotonic() + COMPARE_SECONDS
            known = await asyncio.to_thread(self._queue.run_ids)
            async with self._engine.connect() as connection:
                queued = await sweep.queued(connection)
            await self._enqueue([entry for entry in queued if entry[0] not in known][:REFILL])

    async def _enqueue(self, runs: Sequence[tuple[UUID, Priority]]) -> None:
        if not runs:
            return
        logger.info("enqueueing runs that were left behind", extra={"fields": {"runs": len(runs)}})
        for run_id, priority in runs:
            await asyncio.to_thread(self._queue.enqueue_again, run_id, priority)
        async with self._engine.connect() as connection:
            await sweep.unmark(connection, [run_id for run_id, _ in runs])
