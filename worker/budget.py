"""The budget of a run's tenant: before each model call, what it may cost at most is reserved.

What becomes of a reservation, the database sees to (`settle_budget`): it is spent, as far as it was used, when the
reply is recorded, and released when the run is let go of.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from random import Random

from sqlalchemy.ext.asyncio import AsyncEngine

from app.db import budgets
from app.db.budgets import Reservation
from app.domain.errors import OverBudget
from worker.lease import Held, Interruption
from worker.limits import most_cost
from worker.llm.retry import Answer
from worker.loop import Asker
from worker.state import RunState

logger = logging.getLogger(__name__)

SHORTEST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class WithinBudget:
    """Asks the model for what the tenant's budget has room for.

    One reservation is for all that an ask does: tries that failed cost nothing, and whichever of the run's models
    answers, it costs no more than the dearest of them.
    """

    asker: Asker
    engine: AsyncEngine
    held: Held
    random: Random
    draining: Callable[[], bool]

    async def ask(self, state: RunState) -> Answer:
        """Waits while others have reserved what is left: most calls cost less than they might.

        Raises `OverBudget`, `LeaseLost` and what the asker raises.
        """
        usd = None if None in state.prices.values() else most_cost(state)
        while await self._reserve(usd) is Reservation.BUSY:
            logger.debug("waiting for room in the tenant's budget")
            await self._pause()
        # failpoint: after_reserve
        return await self.asker.ask(state)

    async def _reserve(self, usd: Decimal | None) -> Reservation:
        async with self.engine.connect() as connection:
            outcome = await budgets.reserve(connection, self.held.claim, usd)
        if outcome is not Reservation.SPENT:
            return outcome
        if usd is None:
            raise OverBudget("The tenant has a budget, and a model of this agent has no price.")
        raise OverBudget(
            "What is left of the tenant's budget for today is not enough for the next model call;"
            " the budget is renewed at midnight UTC."
        )

    async def _pause(self) -> None:
        """Interruptible, as a model call is; and a worker that goes away hands the run back without waiting."""
        if self.draining():
            self.held.interrupt(Interruption.DRAIN)
        await asyncio.sleep(self.random.uniform(SHORTEST_WAIT_SECONDS, LONGEST_WAIT_SECONDS))
