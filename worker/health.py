"""The worker's health port: is the loop turning, and can this process do its work?"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from app.domain.errors import ConfigurationError


@asynccontextmanager
async def health_server(host: str, port: int, is_ready: Callable[[], Awaitable[bool]]) -> AsyncIterator[None]:
    """Serve `/health/live` (an answer means that the loop turns) and `/health/ready`. `port` 0: serve nothing."""
    if port == 0:
        yield
        return

    async def live(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(_: web.Request) -> web.Response:
        if await is_ready():
            return web.json_response({"status": "ok"})
        return web.json_response({"status": "unavailable"}, status=503)

    app = web.Application()
    app.add_routes([web.get("/health/live", live), web.get("/health/ready", ready)])
    runner = web.AppRunner(app, access_log=None)
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
