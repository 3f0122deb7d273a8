"""Puts accepted and decided runs on the queue in the background, in batches: no caller waits for Redis.

A run that does not get there is marked, and the sweeper enqueues it when Redis is back. If this process dies first, the
sweeper misses the run in Redis by itself.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.db import runs
from app.domain.errors import QueueUnavailable
from app.domain.run import Priority
from app.queue import RunQueue

logger = logging.getLogger(__name__)

MAX_BATCH = 100


@dataclass(frozen=True, slots=True)
class _Pending:
    run_id: UUID
    priority: Priority
    was_there: bool
    """It has been on the queue before, and was marked in Postgres as it was put back."""


class Enqueuer:
    """One for the process, used from its event loop."""

    def __init__(self, queue: RunQueue, engine: AsyncEngine) -> None:
        self._queue = queue
        self._engine = engine
        self._pending: asyncio.Queue[_Pending | None] = asyncio.Queue()

    def put(self, run_id: UUID, priority: Priority) -> None:
        """The run has been committed: hand it to Redis soon. Returns at once."""
        self._pending.put_nowait(_Pending(run_id, priority, was_there=False))

    def put_back(self, run_id: UUID, priority: Priority) -> None:
        """The run goes on, and is marked for the sweeper: hand it to Redis soon. Returns at once."""
        self._pending.put_nowait(_Pending(run_id, priority, was_there=True))

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

    async def _enqueue(self, batch: list[_Pending]) -> None:
        if fresh := [(run.run_id, run.priority) for run in batch if not run.was_there]:
            await self._enqueue_fresh(fresh)
        if back := [(run.run_id, run.priority) for run in batch if run.was_there]:
            await self._put_back(back)

    async def _put_back(self, batch: list[tuple[UUID, Priority]]) -> None:
        # failpoint: before_put_back
        try:
            await asyncio.to_thread(self._queue.put_back, batch)
            # failpoint: after_put_back
        except QueueUnavailable as error:
            logger.warning("not put back, the sweeper will: %s", error, extra={"fields": {"runs": len(batch)}})

    async def _enqueue_fresh(self, batch: list[tuple[UUID, Priority]]) -> None:
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
