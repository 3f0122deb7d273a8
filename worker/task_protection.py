"""On Amazon ECS: asks that this task is not chosen to be stopped while it has runs.

When a service there is scaled in or gets a new release, ECS chooses the tasks that it stops, and knows nothing of runs.
A task that has asked for protection is spared, so the idle ones go first. Nothing rests on it: a worker that is stopped
all the same drains and hands its runs back. That is why what fails here is logged, and harmless.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from app.background import in_background

logger = logging.getLogger(__name__)

_AGENT_VARIABLE = "ECS_AGENT_URI"
"""Set by ECS in the containers of its tasks, and by nobody else: the address of its agent."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds, but for `expires_minutes`."""

    look: float = 0.5
    """Between two looks whether there are runs."""
    idle: float = 5.0
    """A worker that has had no run for so long lets go: ECS takes only so many of these requests."""
    expires_minutes: int = 10
    """After that a protection ends by itself: whose event loop is wedged keeps none."""
    renew: float = 300.0
    """Until a protection is asked for again, well before it expires."""
    longest: float = 1800.0
    """A worker that always has runs would hold up each new release for ever: after so long it lets go."""
    pause: float = 60.0
    """For so long, then, before it asks again."""
    retry: float = 10.0
    """Until a request that failed is made again."""
    patience: float = 2.0
    """That the agent has for an answer."""


@asynccontextmanager
async def protected_while_busy(busy: Callable[[], int]) -> AsyncIterator[None]:
    """For the length of the block, and only on ECS. `busy`: how many runs this worker has."""
    agent_uri = os.environ.get(_AGENT_VARIABLE)
    if not agent_uri:
        yield
        return
    async with in_background(TaskProtection(agent_uri, busy).keep()):
        yield


class TaskProtection:
    """`agent_uri`: that of `ECS_AGENT_URI`. `busy`: how many runs this worker has."""

    def __init__(self, agent_uri: str, busy: Callable[[], int], pace: Pace | None = None) -> None:
        self._url = f"{agent_uri.rstrip('/')}/task-protection/v1/state"
        self._busy = busy
        self._pace = pace or Pace()
        self._since: float | None = None
        """When the protection that is in force began."""
        self._renewed = 0.0
        self._last_busy = 0.0
        self._not_before = 0.0

    async def keep(self) -> None:
        """For ever: protected while there are runs."""
        timeout = aiohttp.ClientTimeout(total=self._pace.patience)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                now = time.monotonic()
                wanted = self._wanted(now)
                if wanted is not None and now >= self._not_before:
                    await self._ask(session, wanted, now)
                await asyncio.sleep(self._pace.look)

    def _wanted(self, now: float) -> bool | None:
        """Is protection to be asked for, or given back? None: it may stay as it is."""
        busy = self._busy() > 0
        if busy:
            self._last_busy = now
        if self._since is None:
            return busy or None
        if now - self._since >= self._pace.longest or now - self._last_busy >= self._pace.idle:
            return False
        return now - self._renewed >= self._pace.renew or None

    async def _ask(self, session: aiohttp.ClientSession, wanted: bool, now: float) -> None:
        try:
            await self._put(session, wanted)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self._not_before = now + self._pace.retry
            fields = {"wanted": wanted, "error": str(error) or type(error).__name__}
            logger.warning("task protection failed", extra={"fields": fields})
            return
        if wanted:
            self._since, self._renewed = now if self._since is None else self._since, now
        elif self._since is not None:
            was_long = now - self._since >= self._pace.longest
            self._since, self._not_before = None, now + self._pace.pause if was_long else 0.0

    async def _put(self, session: aiohttp.ClientSession, wanted: bool) -> None:
        """Raises `ValueError` where the agent answers anything but that it is so: refusals come with 200 as well."""
        body = {"ProtectionEnabled": wanted} | ({"ExpiresInMinutes": self._pace.expires_minutes} if wanted else {})
        async with session.put(self._url, json=body) as response:
            answer = await response.json(content_type=None)
        protection = answer.get("protection") if isinstance(answer, dict) else None
        if not isinstance(protection, dict) or protection.get("ProtectionEnabled") is not wanted:
            raise ValueError(f"HTTP {response.status}: {str(answer)[:300]}")
