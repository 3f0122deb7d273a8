"""Sends what is in the outbox of webhooks. Runs in every worker, in all of them at once.

A message is delivered at least once: what a worker was sending when it died, another one sends again. How fast an
endpoint is matters to its own messages alone: of what is under way, each webhook and each tenant has a small part,
the tenants that have least come first, and an endpoint that fails is sent one message at a time.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from random import Random
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.config import Settings
from app.db import deliveries
from app.db.deliveries import Claimed, Due, Outcome
from worker.delivery import Courier, RetrySchedule, Sender

logger = logging.getLogger(__name__)

UNDER_WAY = 50
"""Messages that one worker sends at a time; of them, of one tenant and to one webhook no more than the next two."""
OF_TENANT = 8
TO_WEBHOOK = 4
LOOK_SECONDS = 1.0
"""How often an idle worker asks Postgres."""
PAUSE_SECONDS = 0.1
"""Between two looks of a busy one."""
CLAIM_SECONDS = 20.0
"""After so long without a word of whoever claimed it, another worker sends a message: twice what sending may take."""
PATIENCE_SECONDS = 5 * 86_400.0
"""A webhook is disabled when it has failed for so long, and for a whole schedule of retries."""
KEPT_SECONDS = 30 * 86_400.0
"""How long one can see what became of a message."""
FORGET_SECONDS = 60.0
BATCH = 1_000


def open_deliverer(settings: Settings, engine: AsyncEngine, sender: Sender) -> "Deliverer | None":
    """The deliverer of this process; None where there is no key to sign with."""
    if settings.webhook_signing_key is None:
        logger.info("webhooks are not sent: WEBHOOK_SIGNING_KEY is not set")
        return None
    return Deliverer(engine, sender, settings.webhook_signing_key.get_secret_value())


class Deliverer:
    """One per worker process. It uses one connection to Postgres at a time, however much is under way."""

    def __init__(
        self,
        engine: AsyncEngine,
        sender: Sender,
        signing_key: str,
        *,
        schedule: RetrySchedule = RetrySchedule(),  # noqa: B008 - it never changes
        claim_seconds: float = CLAIM_SECONDS,
    ) -> None:
        self._engine = engine
        self._random = Random()  # noqa: S311 - jitter, not a secret
        self._courier = Courier(sender=sender, signing_key=signing_key, schedule=schedule, random=self._random)
        self._claim_seconds = claim_seconds
        self._under_way: dict[asyncio.Task[Outcome], Claimed] = {}
        self._stopped = False
        self._forget_at = 0.0

    def stop(self) -> None:
        """Begin nothing more. What is under way may still be told until the task ends."""
        self._stopped = True

    async def keep_delivering(self) -> None:
        """Deliver for ever; what fails is tried again at the next look. What is under way ends with this task."""
        try:
            while True:
                try:
                    await self.look()
                except SQLAlchemyError as error:
                    logger.warning("webhooks wait for Postgres", extra={"fields": {"error": str(error)}})
                    await asyncio.sleep(LOOK_SECONDS)
                await asyncio.sleep(PAUSE_SECONDS)
                await self._until_there_is_news()
        finally:
            for task in self._under_way:
                task.cancel()

    async def look(self) -> None:
        """Write down what came of what was sent, and begin what is due."""
        await self._settle()
        if not self._stopped:
            await self._begin()
            await self._forget()

    async def _until_there_is_news(self) -> None:
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(LOOK_SECONDS)

    async def _settle(self) -> None:
        """Until Postgres has heard of it, what is done counts as under way."""
        done = [task for task in self._under_way if task.done()]
        if not done:
            return
        outcomes = [task.result() for task in done]
        async with self._engine.connect() as connection:
            disabled = await deliveries.settle(connection, outcomes, patience_s=PATIENCE_SECONDS)
        for task in done:
            del self._under_way[task]
        for webhook_id in disabled:
            logger.warning("webhook disabled", extra={"fields": {"webhook": str(webhook_id)}})

    async def _begin(self) -> None:
        async with self._engine.connect() as connection:
            due = await deliveries.due(connection)
            if closed := [webhook.webhook_id for webhook in due if webhook.is_closed]:
                await deliveries.close(connection, closed, limit=BATCH)
            share = self._share([webhook for webhook in due if not webhook.is_closed])
            if not share:
                return
            claimed = await deliveries.claim(connection, share, lease_seconds=self._claim_seconds)
        for delivery in claimed:
            self._under_way[asyncio.create_task(self._courier.attempt(delivery))] = delivery

    def _share(self, due: Sequence[Due]) -> dict[UUID, int]:
        shuffled = self._random.sample(due, len(due))
        return fair_share(shuffled, self._under_way.values())

    async def _forget(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._forget_at:
            return
        async with self._engine.connect() as connection:
            forgotten = await deliveries.forget(connection, older_than_s=KEPT_SECONDS, limit=BATCH)
        self._forget_at = now if forgotten == BATCH else now + FORGET_SECONDS


def fair_share(due: Iterable[Due], under_way: Iterable[Claimed]) -> dict[UUID, int]:
    """How many messages may be begun now to each webhook that some are due for: one to each, then a second, and so on.

    Tenants that have least under way come first; where that is equal, it goes by the order in which they are given.
    """
    busy = list(under_way)
    of_tenant = Counter(claimed.tenant for claimed in busy)
    to_webhook = Counter(claimed.webhook_id for claimed in busy)
    room = UNDER_WAY - len(busy)
    share: Counter[UUID] = Counter()
    in_turn = sorted(due, key=lambda webhook: of_tenant[webhook.tenant])
    for _ in range(TO_WEBHOOK):
        for webhook in in_turn:
            most = 1 if webhook.is_failing else TO_WEBHOOK
            if room and to_webhook[webhook.webhook_id] < most and of_tenant[webhook.tenant] < OF_TENANT:
                share[webhook.webhook_id] += 1
                to_webhook[webhook.webhook_id] += 1
                of_tenant[webhook.tenant] += 1
                room -= 1
    return share
