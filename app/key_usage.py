"""When keys were last used. Requests only note it; the database is told in the background, twice a minute."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.background import in_background, within
from app.db import keys

MAX_KEYS = 10_000
"""So many are remembered until the database has been told; of more, that they were used is forgotten."""
_PATIENCE_SECONDS = 1.0
"""How long the end of the process may wait for the database."""

logger = logging.getLogger(__name__)


class KeyUsage:
    """One for the process, used from its event loop. A database that is away makes the dates late, and nothing else."""

    def __init__(self, engine: AsyncEngine, *, every_s: float = 30.0) -> None:
        self._engine = engine
        self._every_s = every_s
        self._used: dict[str, float] = {}

    def note(self, key_id: str) -> None:
        """The key is in use, now."""
        if key_id in self._used or len(self._used) < MAX_KEYS:
            self._used[key_id] = time.monotonic()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Tell the database for the length of the block, and at its end."""
        try:
            async with in_background(self._work()):
                yield
        finally:
            await self._flush()

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._flush()

    async def _flush(self) -> None:
        told = dict(self._used)
        if not told:
            return
        try:
            left_out = set(await within(_PATIENCE_SECONDS, self._write(told)))
        except (SQLAlchemyError, TimeoutError) as error:
            logger.warning("last use of keys not written: %s", error, extra={"fields": {"keys": len(told)}})
            return
        later = {key_id: at for key_id, at in self._used.items() if key_id in left_out or at != told.get(key_id)}
        self._used = later

    async def _write(self, used: dict[str, float]) -> Sequence[str]:
        now = time.monotonic()
        async with self._engine.connect() as connection:
            return await keys.note_used(connection, {key_id: now - moment for key_id, moment in used.items()})
