"""Tells of the runs that ended outside of a worker: cancelled, decided or given up."""

import asyncio
import logging

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.background import within
from app.db import reports, reviews
from worker.observer import Observer

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
PATIENCE_SECONDS = 10.0
BATCH = 200


class Reporter:
    """One per worker process; each such run is taken by one of them."""

    def __init__(self, engine: AsyncEngine, observer: Observer) -> None:
        self._engine = engine
        self._observer = observer

    async def keep_reporting(self) -> None:
        """For ever; what fails is tried again."""
        while True:
            try:
                while await within(PATIENCE_SECONDS, self.report()) == BATCH:
                    pass
            except (SQLAlchemyError, TimeoutError) as error:
                logger.warning("reports failed", extra={"fields": {"error": str(error)}})
            await asyncio.sleep(LOOK_SECONDS)

    async def report(self) -> int:
        """Tell of those that nobody has told of yet. Returns how many."""
        async with self._engine.connect() as connection:
            ended = await reports.take_unreported(connection, limit=BATCH)
            for run in ended:
                if run.waiting_since is not None:
                    self._observer.reviewed(run, await reviews.of_run(connection, run.id))
                self._observer.ended(run)
        return len(ended)
