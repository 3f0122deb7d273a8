"""Starts a worker: settings, connections, heartbeat, sweeper, health port, then the queue; and takes it all down."""

import asyncio
import logging
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import uvloop
from sqlalchemy.ext.asyncio import AsyncEngine

from app.background import in_background
from app.config import Settings, load_settings
from app.db.engine import ReadOnlyDatabase, make_engine
from app.domain.errors import ConfigurationError
from app.logging import configure_logging
from app.metrics import make_registry
from app.prices import load_prices
from app.queue import RunQueue
from app.registry import load_agents
from app.signals import CANCELLED, Signals
from worker.deliverer import open_deliverer
from worker.egress import Egress
from worker.ending import Ending
from worker.executor import Executor, ModelAsker
from worker.feeder import Feeder
from worker.health import can_reach, health_server
from worker.lease import Leases
from worker.llm.openai import OpenAIModel
from worker.llm.retry import RetryPolicy
from worker.metrics import WorkerMetrics
from worker.queue_worker import ConcurrentWorker
from worker.reporter import Reporter
from worker.sealer import open_sealer
from worker.sweeper import Sweeper
from worker.task_protection import protected_while_busy
from worker.telemetry import Telemetry, open_telemetry
from worker.tools.call import ToolCaller
from worker.watchdog import Watchdog

logger = logging.getLogger("worker")

RUN_CONNECTIONS = 10
"""Connections to Postgres that all runs share; a run uses one only while a statement lasts."""
TOOL_CONNECTIONS = 5
"""Those of `ctx.db`: however slow the tools' queries are, the runs' own statements do not wait for them."""
VITAL_CONNECTIONS = 7
"""Those of heartbeat, sweeper, sealer, deliverer and probe: what keeps the leases waits for neither."""
TOOL_THREADS = 32
TOOL_PATIENCE_SECONDS = 600.0
"""How long `ctx.db` waits for a connection; the timeout of the tool is nearly always shorter."""
LEAVE_SECONDS = 0.8
"""Of `DRAIN_SECONDS`, what is kept for telling Redis after the runs have come to rest."""
FAREWELL_SECONDS = 1.5
"""How long a Redis or a tracing back end that does not answer may hold up the end: a pop blocks for 1 s."""
ENDS_AFTER_LEASES = 3
ENDS_AFTER_SECONDS = 30.0
"""A worker whose event loop is silent for so many leases, and at least for so long, ends itself."""


def main() -> None:
    """Entry point of the process.

    Exit code 0 after a drain, 2 for a wrong setting, 1 when the worker broke, 70 when its event loop did not end it.
    """
    code = 0
    try:
        settings = load_settings()
        configure_logging(settings.log_level, secrets=settings.secrets, patterns=settings.redact_patterns)
        # Not `uvloop.run`: that waits for tasks that do not heed their cancellation, and those have lost their runs.
        asyncio.Runner(loop_factory=uvloop.new_event_loop).run(run_worker(settings))
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


def open_model(settings: Settings) -> OpenAIModel:
    """The provider's, or the stand-in."""
    api_key, base_url = settings.model_access()
    if settings.is_stand_in:
        logger.warning("the stand-in model answers: there is no OPENAI_API_KEY")
    return OpenAIModel(api_key=api_key, base_url=base_url)


async def run_worker(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT, then drain."""
    loop = asyncio.get_running_loop()
    ending = Ending(drain_seconds=settings.drain_seconds)
    ending.listen()

    async with AsyncExitStack() as stack:
        name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
        database_url = settings.database_url.get_secret_value()
        redis_url = settings.redis_url.get_secret_value()
        agents = load_agents(settings.agents)
        model = await stack.enter_async_context(open_model(settings))

        def engine_for(purpose: str, connections: int, *, patience: float) -> AsyncEngine:
            engine = make_engine(
                database_url,
                pool_size=connections,
                application_name=f"worker {purpose} {name}",
                pool_timeout_s=patience,
            )
            stack.push_async_callback(engine.dispose)
            return engine

        engine = engine_for("runs", RUN_CONNECTIONS, patience=settings.lease_seconds)
        vital_engine = engine_for("vital", VITAL_CONNECTIONS, patience=settings.lease_seconds)
        tool_engine = engine_for("tools", TOOL_CONNECTIONS, patience=TOOL_PATIENCE_SECONDS)
        signals = Signals(redis_url)
        stack.push_async_callback(signals.aclose)
        queue = RunQueue(redis_url)
        stack.callback(queue.close)
        tool_threads = ThreadPoolExecutor(TOOL_THREADS, thread_name_prefix="tool")
        stack.callback(tool_threads.shutdown, wait=False, cancel_futures=True)

        egress = await stack.enter_async_context(Egress(settings.egress_trusted_origins))
        metrics = WorkerMetrics(
            make_registry(settings.build),
            agents,
            model=settings.model,
        )
        leases = Leases(vital_engine, settings.lease_seconds, metrics)
        telemetry = open_telemetry(settings, worker=name, agents=agents, metrics=metrics)
        executor = Executor(
            worker=name,
            engine=engine,
            held=leases,
            agents=agents,
            model_override=settings.model,
            prices=load_prices(),
            asker=ModelAsker(model, RetryPolicy(), Random()),  # noqa: S311 - jitter, not a secret
            caller=ToolCaller(ReadOnlyDatabase(tool_engine), egress, tool_threads),
            signals=signals,
            observer=telemetry.observer,
            build=settings.build,
        )

        sealer = open_sealer(settings, vital_engine)
        # Not that of the tools: endpoints and name servers that keep silent hold up only deliveries.
        couriers = await stack.enter_async_context(Egress(settings.egress_trusted_origins))
        deliverer = open_deliverer(settings, vital_engine, couriers)
        watchdog = Watchdog(ends_after=max(ENDS_AFTER_LEASES * settings.lease_seconds, ENDS_AFTER_SECONDS))
        vital = [
            await stack.enter_async_context(in_background(work))
            for work in (
                watchdog.beat(),
                metrics.loop_lag.keep_measuring(),
                leases.keep(),
                Sweeper(vital_engine, queue, signals, metrics).keep_sweeping(),
                signals.listen(CANCELLED, leases.drop),
                Reporter(vital_engine, telemetry.observer).keep_reporting(),
                *([sealer.keep_sealing()] if sealer else []),
                *([deliverer.keep_delivering()] if deliverer else []),
            )
        ]
        watchdog.start()

        async def is_ready() -> bool:
            return not ending.asked.is_set() and await can_reach(vital_engine, redis_url)

        await stack.enter_async_context(
            health_server(settings.api_host, settings.worker_health_port, is_ready, metrics.text)
        )

        def make_queue_worker() -> ConcurrentWorker:
            return ConcurrentWorker(
                name=name,
                redis_url=redis_url,
                slots=settings.worker_concurrency,
                loop=loop,
                execute=executor.execute,
                cancel=executor.cancel,
                loop_silence=lambda: watchdog.silence,
            )

        feeder = Feeder(redis_url, make_queue_worker)
        metrics.watch_slots(settings.worker_concurrency, lambda: feeder.busy, is_closed=ending.asked.is_set)
        await stack.enter_async_context(protected_while_busy(lambda: feeder.busy))
        feeding = loop.run_in_executor(ThreadPoolExecutor(1, thread_name_prefix="feeder"), feeder.feed)
        logger.info("worker started", extra={"fields": {"worker": name, "slots": settings.worker_concurrency}})
        asked: asyncio.Future[Any] = await stack.enter_async_context(in_background(ending.asked.wait()))
        await asyncio.wait([feeding, asked, *vital], return_when=asyncio.FIRST_COMPLETED)
        ending.ask()
        if deliverer:
            deliverer.stop()
        await drain(ending, executor, feeder, feeding, telemetry)
        for task in (feeding, *vital):
            if task.done():
                task.result()  # what they raise ends this process
        logger.info("worker stopped", extra={"fields": {"worker": name}})


async def drain(
    ending: Ending, executor: Executor, feeder: Feeder, feeding: "asyncio.Future[None]", telemetry: Telemetry
) -> None:
    """Bring the runs to rest, and tell Redis and the tracing back ends so."""
    feeder.stop()
    for run_id, priority in await executor.drain(ending.seconds_left - LEAVE_SECONDS, hurried=ending.hurried):
        feeder.let_go(run_id, priority)
    farewell = min(FAREWELL_SECONDS, ending.seconds_left)
    await asyncio.gather(asyncio.wait([feeding], timeout=farewell), telemetry.close(farewell))
