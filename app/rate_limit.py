"""How often a key may ask: a token bucket in Redis, which all API processes share.

A bucket holds `burst` tokens, and `requests_per_s` of them flow in. All that is stored of it is the moment at which it
will be full again; a bucket that is full is not stored at all, so it is gone when nobody uses it. It belongs to the
holder: whoever has two keys for a while, because one is being replaced, has one bucket.

Redis is a hint here, too. Where it is away, slow or full, requests are let through unchecked rather than refused.
"""

import asyncio
import hashlib
import logging

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from app.background import within
from app.domain.errors import RateLimited
from app.domain.principal import Principal

PATIENCE_SECONDS = 0.25
"""A Redis that takes longer to answer counts as away."""
LEFT_ALONE_SECONDS = 1.0
"""While Redis is away, one request in so many seconds finds out whether it is back; the others do not wait for it."""

_CONNECTIONS = 10
_MICROSECONDS = 1_000_000
_AWAY = (RedisError, OSError, RuntimeError)
"""What comes when Redis is away. `RuntimeError` is uvloop's, for a connection that was lost a moment ago."""

# All numbers are whole microseconds below 2^53, so a double is exact. The time is Redis' own: processes may differ.
# A moment further ahead than an empty bucket needs cannot be: the clock was set back, or the limit was raised.
_TAKE = """
    local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
    local time = redis.call('TIME')
    local now = time[1] * 1000000 + time[2]
    local empty = now + interval * burst
    local function store(moment)
        redis.call('SET', KEYS[1], string.format('%.0f', moment), 'PX', math.ceil((moment - now) / 1000))
    end

    local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or '') or now, now)
    if full_at > empty then
        full_at = empty
        store(full_at)
    end
    if full_at + interval > empty then return full_at + interval - empty end
    store(full_at + interval)
    return 0
"""
"""Takes a token. Returns the microseconds until there is one, where there is none; then nothing is taken."""
_TAKE_SHA = hashlib.sha1(_TAKE.encode(), usedforsecurity=False).hexdigest()

logger = logging.getLogger(__name__)


class RateLimiter:
    """One for the process, used from its event loop."""

    def __init__(self, redis_url: str) -> None:
        self._redis = Redis.from_pool(
            BlockingConnectionPool.from_url(
                redis_url,
                max_connections=_CONNECTIONS,
                timeout=PATIENCE_SECONDS,
                socket_connect_timeout=PATIENCE_SECONDS,
                socket_timeout=PATIENCE_SECONDS,
                retry=Retry(NoBackoff(), 0),
            )
        )
        self._is_away = False
        self._ask_again_at = 0.0

    async def admit(self, caller: Principal) -> bool:
        """Count a request. False: nobody could, Redis is away.

        Raises `RateLimited`.
        """
        clock = asyncio.get_running_loop().time
        if self._is_away:
            if clock() < self._ask_again_at:
                return False
            self._ask_again_at = clock() + LEFT_ALONE_SECONDS
        limits = caller.limits
        try:
            wait = await within(PATIENCE_SECONDS, self._take(caller.holder, limits.requests_per_s, limits.burst))
        except _AWAY as error:
            self._ask_again_at = clock() + LEFT_ALONE_SECONDS
            if not self._is_away:
                logger.warning("rate limits are not kept: %s", str(error) or type(error).__name__)
            self._is_away = True
            return False
        if self._is_away:
            logger.info("rate limits are kept again")
            self._is_away = False
        if wait > 0:
            raise RateLimited(
                f"this key may make {limits.requests_per_s:g} requests per second, and {limits.burst} at once",
                retry_after=wait,
            )
        return True

    async def _take(self, holder: str, requests_per_s: float, burst: int) -> float:
        """Seconds until there is a token; 0: one was taken."""
        interval = max(1, round(_MICROSECONDS / requests_per_s))
        bucket = (f"agent-service:rate:{holder}", interval, burst)
        try:
            wait = await self._redis.execute_command("EVALSHA", _TAKE_SHA, 1, *bucket)  # type: ignore[no-untyped-call]
        except NoScriptError:  # Redis was started anew, or told to forget scripts
            wait = await self._redis.execute_command("EVAL", _TAKE, 1, *bucket)  # type: ignore[no-untyped-call]
        return int(wait) / _MICROSECONDS

    async def aclose(self) -> None:
        await self._redis.aclose()
