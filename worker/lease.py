"""The leases of this process: one statement extends them all; a run whose lease is gone is stopped at once."""

import asyncio
import logging
from dataclasses import dataclass, field
from enum import Enum, auto
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.background import within
from app.db import leases
from app.domain.run import Claim

logger = logging.getLogger(__name__)


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
    interruption: Interruption | None = None

    def interrupt(self, why: Interruption) -> None:
        """Cancel the task, once."""
        if self.interruption is None:
            self.interruption = why
            self.task.cancel()


@dataclass(slots=True)
class Leases:
    """All runs in execution here, and the heartbeat that keeps them ours."""

    engine: AsyncEngine
    lease_seconds: float
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
        async with self.engine.connect() as connection:
            kept = await leases.extend(connection, tokens, lease_seconds=self.lease_seconds)
        for run_id in tokens.keys() - kept:
            held = self.held.get(run_id)
            if held is not None and held.claim.token == tokens[run_id]:  # not one that was claimed anew meanwhile
                held.interrupt(Interruption.LOST)

    def drop(self, run_id: UUID) -> None:
        """The run is not ours any more: stop it here, if it is here."""
        if held := self.held.get(run_id):
            held.interrupt(Interruption.LOST)
