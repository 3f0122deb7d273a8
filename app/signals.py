"""Wake-ups over Redis pub/sub, in both directions. A lost one costs time, never truth: Postgres is asked again anyway.

`RESTED`: a run has come to rest (ended, or waits for a person); pollers wake. `CANCELLED`: its worker stops it at once.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import UUID

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.background import in_background

RESTED = "agent-service:rested"
CANCELLED = "agent-service:cancelled"
_RECONNECT_SECONDS = 1.0
_AWAY = (RedisError, OSError, RuntimeError)
"""What comes when Redis is away. `RuntimeError` is uvloop's, for a connection that was lost a moment ago."""

logger = logging.getLogger(__name__)


class Signals:
    """Publishes run ids, and hands those that arrive to a callback."""

    def __init__(self, redis_url: str) -> None:
        self._redis = Redis.from_url(
            redis_url, socket_connect_timeout=1.0, socket_timeout=5.0, retry=Retry(NoBackoff(), 0)
        )
        self._publishing: set[asyncio.Task[None]] = set()

    async def publish(self, channel: str, run_id: UUID) -> None:
        """Best effort: a Redis that is away is logged and forgotten."""
        try:
            await self._redis.publish(channel, str(run_id))
        except _AWAY as error:
            logger.warning("signal lost: %s", error, extra={"fields": {"channel": channel}})

    def publish_soon(self, channel: str, run_id: UUID) -> None:
        """Publish in the background. Returns at once, also where Redis hangs."""
        task = asyncio.create_task(self.publish(channel, run_id))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def is_reachable(self) -> bool:
        """Does Redis answer?"""
        try:
            await self._redis.ping()
        except _AWAY:
            return False
        return True

    async def listen(self, channel: str, receive: Callable[[UUID], None]) -> None:
        """Call `receive` for every run id published, reconnecting for ever. Ends only by cancellation."""
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(channel)
                    while True:
                        message = await pubsub.get_message(timeout=4.0)
                        if message is not None and (run_id := _run_id(message["data"])) is not None:
                            receive(run_id)
            except _AWAY as error:
                logger.warning("signals away: %s", error, extra={"fields": {"channel": channel}})
                await asyncio.sleep(_RECONNECT_SECONDS)

    @asynccontextmanager
    async def listening(self, channel: str, receive: Callable[[UUID], None]) -> AsyncIterator[None]:
        """Listen in the background for the length of the block."""
        async with in_background(self.listen(channel, receive)):
            yield

    async def aclose(self) -> None:
        if self._publishing:
            await asyncio.wait(self._publishing, timeout=1.0)
        await self._redis.aclose()


def _run_id(data: bytes) -> UUID | None:
    try:
        return UUID(data.decode())
    except ValueError:  # not from us
        return None
