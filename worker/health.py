"""The worker's health port: is the loop turning, can this process do its work, and what has it counted?"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import redis.asyncio
from aiohttp import web
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.background import within
from app.domain.errors import ConfigurationError
from app.metrics import CONTENT_TYPE

PROBE_SECONDS = 2.0
"""How long Postgres and Redis may take to answer a probe."""


@asynccontextmanager
async def health_server(
    host: str, port: int, is_ready: Callable[[], Awaitable[bool]], metrics: Callable[[], bytes]
) -> AsyncIterator[None]:
    """Serve `/health/live` (an answer means that the loop turns), `/health/ready` and `/metrics`. No key is asked for.

    `port` 0: serve nothing. `metrics`: makes the text for Prometheus, in a thread, because it may be long.
    """
    if port == 0:
        yield
        return

    async def live(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(_: web.Request) -> web.Response:
        if await is_ready():
            return web.json_response({"status": "ok"})
        return web.json_response({"status": "unavailable"}, status=503)

    # Of its own: the event loop's may be waiting for Redis. And only one, however many ask.
    scraping = ThreadPoolExecutor(1, thread_name_prefix="metrics")

    async def scrape(_: web.Request) -> web.Response:
        text = await asyncio.get_running_loop().run_in_executor(scraping, metrics)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.add_routes([web.get("/health/live", live), web.get("/health/ready", ready), web.get("/metrics", scrape)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)  # a draining worker waits for no probe
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigurationError(
                f"API_HOST, WORKER_HEALTH_PORT: cannot listen on {host}:{port}: {error.strerror}"
            ) from error
        yield
    finally:
        await runner.cleanup()
        scraping.shutdown(wait=False, cancel_futures=True)


async def can_reach(engine: AsyncEngine, redis_url: str) -> bool:
    """Do Postgres and Redis answer?"""

    async def ask() -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        async with redis.asyncio.Redis.from_url(redis_url, socket_connect_timeout=1.0) as client:
            await client.ping()

    try:
        await within(PROBE_SECONDS, ask())
    except (SQLAlchemyError, RedisError, TimeoutError):
        return False
    return True
