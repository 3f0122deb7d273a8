"""Starts a worker: settings, connections, heartbeat, sweeper, health port, then the queue; and takes it all down."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from random import Random
from typing import Any
from uuid import UUID

import redis
import uvloop
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.background import in_background, within
from app.config import Settings, load_settings
from app.db import runs
from app.db.engine import ReadOnlyDatabase, make_engine
from app.domain.errors import ConfigurationError
from app.logging import configure_logging
from app.prices import load_prices
from app.queue import RunQueue
from app.registry import load_agents
from app.signals import CANCELLED, RESTED, Signals
from worker.executor import Executor, ModelAsker
from worker.health import health_server
from worker.lease import Leases
from worker.llm.openai import OpenAIModel
from worker.llm.retry import RetryPolicy
from worker.queue_worker import ConcurrentWorker
from worker.sweeper import Sweeper
from worker.tools.call import ToolCaller

logger = logging.getLogger("worker")

POOL_SIZE = 10
"""Connections to Postgres; a run uses one only while a statement lasts."""
TOOL_THREADS = 32
DRAIN_MARGIN_SECONDS = 1.5
"""Of `DRAIN_SECONDS`, what is kept for handing back and taking leave after the runs have been cut off."""
LOOP_SILENCE_SECONDS = 10.0
"""A loop that gave no sign of life for so long is wedged: the worker no longer calls itself alive."""


def main() -> None:
    """Entry point of the process: exit code 0 after a drain, 2 for a wrong setting, 1 when the worker broke."""
    code = 0
    try:
        settings = load_settings()
        configure_logging(settings.log_level)
        uvloop.run(run_worker(settings))
    except ConfigurationError as error:
        print(f"agent-service: {error}", file=sys.stderr)  # noqa: T201 - logging may not be configured yet
        code = 2
    except Exception:
        logger.exception("worker broke")
        code = 1
    logging.shutdown()
    sys.stderr.flush()
    # Not `sys.exit`: that waits for threads, and a tool's may run on for long, a frozen Redis' for ever.
    os._exit(code)


async def run_worker(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT, then drain."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    async with AsyncExitStack() as stack:
        name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
        database_url = settings.database_url.get_secret_value()
        redis_url = settings.redis_url.get_secret_value()
        agents = load_agents(settings.agents)
        model = await stack.enter_async_context(
            OpenAIModel(api_key=settings.require_model_key().get_secret_value(), base_url=settings.openai_base_url)
        )
        require_noeviction(redis_url)
        engine = make_engine(
            database_url,
            pool_size=POOL_SIZE,
            application_name=f"worker {name}",
            pool_timeout_s=settings.lease_seconds,  # after that the lease is gone anyway
        )
        stack.push_async_callback(engine.dispose)
        signals = Signals(redis_url)
        stack.push_async_callback(signals.aclose)
        queue = RunQueue(redis_url)
        stack.callback(queue.close)
        tool_threads = ThreadPoolExecutor(TOOL_THREADS, thread_name_prefix="tool")
        stack.callback(tool_threads.shutdown, wait=False, cancel_futures=True)

        leases = Leases(engine, settings.lease_seconds)
        executor = Executor(
            worker=name,
            engine=engine,
            held=leases,
            agents=agents,
            model_override=settings.model,
            prices=load_prices(),
            asker=ModelAsker(model, RetryPolicy(), Random()),  # noqa: S311 - jitter, not a secret
            caller=ToolCaller(ReadOnlyDatabase(engine), tool_threads),
            signals=signals,
            image_digest=settings.image_digest,
        )

        async def cancel(run_id: UUID) -> None:
            """`rq`'s stop-job."""
            held = leases.held.get(run_id)
            if held is None:
                return
            async with engine.connect() as connection:
                await runs.cancel(connection, run_id, held.claim.run.tenant, actor=f"worker:{name}")
            leases.drop(run_id)
            await signals.publish(RESTED, run_id)

        pulse = Pulse()
        vital = [
            await stack.enter_async_context(in_background(work))
            for work in (
                pulse.beat(),
                leases.keep(),
                Sweeper(engine, queue, signals).keep_sweeping(),
                signals.listen(CANCELLED, leases.drop),
            )
        ]

        async def is_ready() -> bool:
            return not stop.is_set() and await can_reach(engine, redis_url)

        await stack.enter_async_context(health_server(settings.api_host, settings.worker_health_port, is_ready))

        def make_queue_worker() -> ConcurrentWorker:
            return ConcurrentWorker(
                name=name,
                redis_url=redis_url,
                slots=settings.worker_concurrency,
                loop=loop,
                execute=executor.execute,
                cancel=cancel,
                loop_is_alive=lambda: pulse.age() < LOOP_SILENCE_SECONDS,
            )

        feeder = Feeder(make_queue_worker)
        stack.callback(feeder.stop)
        feeding = loop.run_in_executor(ThreadPoolExecutor(1, thread_name_prefix="feeder"), feeder.feed)
        logger.info("worker started", extra={"fields": {"worker": name, "slots": settings.worker_concurrency}})
        stopping = await stack.enter_async_context(in_background(stop.wait()))
        ends: list[asyncio.Future[Any]] = [feeding, stopping, *vital]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        feeder.stop()
        await executor.drain(max(0.5, settings.drain_seconds - DRAIN_MARGIN_SECONDS))
        await asyncio.wait([feeding], timeout=DRAIN_MARGIN_SECONDS)
        for task in vital:
            if task.done():
                task.result()  # none of them ends but by an error, which ends this process
        logger.info("worker stopped", extra={"fields": {"worker": name}})


class Pulse:
    """The event loop's sign of life."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    async def beat(self) -> None:
        while True:
            self._last = time.monotonic()
            await asyncio.sleep(0.5)

    def age(self) -> float:
        """Seconds since the loop last turned."""
        return time.monotonic() - self._last


class Feeder:
    """Keeps a queue worker going in its thread; waits for Redis where it is away at the start."""

    def __init__(self, make: Callable[[], ConcurrentWorker]) -> None:
        self._make = make
        self._stopping = threading.Event()
        self._worker: ConcurrentWorker | None = None

    def feed(self) -> None:
        """Work until `stop`."""
        while not self._stopping.is_set():
            try:
                self._worker = self._make()
                if not self._stopping.is_set():
                    self._worker.work(logging_level="WARNING")
            except RedisError as error:
                logger.warning("Redis is away", extra={"fields": {"error": str(error)}})
                self._stopping.wait(1.0)

    def stop(self) -> None:
        """Take no more jobs; from any thread."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.stop()


async def can_reach(engine: AsyncEngine, redis_url: str) -> bool:
    """Do Postgres and Redis answer?"""

    async def ask() -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        async with redis.asyncio.Redis.from_url(redis_url, socket_connect_timeout=1.0) as client:
            await client.ping()

    try:
        await within(2.0, ask())
    except (SQLAlchemyError, RedisError, TimeoutError):
        return False
    return True


def require_noeviction(redis_url: str) -> None:
    """A Redis that evicts would drop jobs. One that is away is asked again by the first connection that needs it."""
    with suppress(RedisError), redis.Redis.from_url(redis_url, socket_connect_timeout=2.0) as client:
        policy = client.info("memory").get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise ConfigurationError(f"REDIS_URL: the server's maxmemory-policy is {policy}; it must be noeviction")
