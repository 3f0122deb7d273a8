"""Puts accepted runs on the queue in the background, in batches: no submitter waits for Redis.

A run that does not get there is marked, and the sweeper enqueues it when Redis is back. If this process dies first, the
sweeper misses the run in Redis by itself.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.db import runs
from app.domain.errors import QueueUnavailable
from app.domain.run import Priority
from app.queue import RunQueue

logger = logging.getLogger(__name__)

MAX_BATCH = 100


class Enqueuer:
    """One for the process, used from its event loop."""

    def __init__(self, queue: RunQueue, engine: AsyncEngine) -> None:
        self._queue = queue
        self._engine = engine
        self._pending: asyncio.Queue[tuple[UUID, Priority] | None] = asyncio.Queue()

    def put(self, run_id: UUID, priority: Priority) -> None:
        """The run has been committed: hand it to Redis soon. Returns at once."""
        self._pending.put_nowait((run_id, priority))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Work for the length of the block, and finish what is pending at its end."""
        task = asyncio.create_task(self._work(), name="enqueuer")
        try:
            yield
        finally:
            self._pending.put_nowait(None)
            await task

    async def _work(self) -> None:
        while (first := await self._pending.get()) is not None:
            batch = [first]
            while len(batch) < MAX_BATCH and not self._pending.empty():
                following = self._pending.get_nowait()
                if following is None:
                    await self._enqueue(batch)
                    return
                batch.append(following)
            await self._enqueue(batch)

    async def _enqueue(self, batch: list[tuple[UUID, Priority]]) -> None:
        # failpoint: before_enqueue
        try:
            await asyncio.to_thread(self._queue.enqueue, batch)
            # failpoint: after_enqueue
        except QueueUnavailable as error:
            logger.warning("not enqueued, the sweeper will: %s", error, extra={"fields": {"runs": len(batch)}})
            await self._mark([run_id for run_id, _ in batch])

    async def _mark(self, run_ids: list[UUID]) -> None:
        try:
            async with self._engine.connect() as connection:
                await runs.mark_needs_enqueue(connection, run_ids)
        except SQLAlchemyError as error:
            logger.warning("not marked either: %s", error, extra={"fields": {"runs": len(run_ids)}})
