"""An RQ worker that executes many runs on one event loop.

RQ's `work()` runs in a thread and feeds the loop: take a slot, pop a job, schedule its run, pop the next. `rq info`,
suspend, resume, stop-job and warm shutdown work as with RQ's own workers. What RQ keeps about jobs is written by
`worker/books.py`, off the run's way.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any
from uuid import UUID

from redis.client import Pipeline, PubSub, PubSubWorkerThread
from redis.exceptions import RedisError
from rq import Queue, worker_registration
from rq.command import parse_payload
from rq.job import Job
from rq.suspension import is_suspended
from rq.timeouts import BaseDeathPenalty
from rq.utils import now as _rq_now
from rq.worker import BaseWorker, WorkerStatus

from app.domain.run import Priority
from app.queue import QUEUE_NAME, SERIALIZER, RunQueue
from worker.books import Books, Opened, Rest
from worker.dequeue import DEQUEUE_SECONDS, RECONNECT_SECONDS, REDIS_TIMEOUT_SECONDS, JobSource, connect
from worker.watchdog import WEDGED_SECONDS

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 2.0
"""An event loop that was silent for so long is fed no more jobs until it turns again."""
SILENT_PAUSE_SECONDS = 0.2
HEARTBEAT_SECONDS = 2.0
EXECUTION_HEARTBEAT_SECONDS = 20.0
MAINTENANCE_SECONDS = 30
WORKER_TTL_SECONDS = 20
"""After its last heartbeat a worker is shown by `rq info` for so long."""


class _NoPenalty(BaseDeathPenalty):
    """The run's deadline bounds it; RQ's alarms would fail outside the main thread."""

    def setup_death_penalty(self) -> None: ...

    def cancel_death_penalty(self) -> None: ...


class ConcurrentWorker(BaseWorker):
    """Feeds the event loop with runs.

    `slots`: runs at a time. `execute`: takes a run as far as it goes; a priority means: enqueue it again, with that.
    `cancel`: stops a run for good. `loop_silence`: for how many seconds the loop has given no sign of life.
    """

    death_penalty_class = _NoPenalty

    def __init__(
        self,
        *,
        name: str,
        redis_url: str,
        slots: int,
        loop: asyncio.AbstractEventLoop,
        execute: Callable[[UUID], Coroutine[Any, Any, Priority | None]],
        cancel: Callable[[UUID], Coroutine[Any, Any, None]],
        loop_silence: Callable[[], float],
    ) -> None:
        super().__init__(
            [QUEUE_NAME],
            name=name,
            connection=connect(redis_url),
            worker_ttl=WORKER_TTL_SECONDS,
            maintenance_interval=MAINTENANCE_SECONDS,
            serializer=SERIALIZER,
            log_job_description=False,
        )
        self._queue: Queue = self.queues[0]
        self._jobs = JobSource(redis_url, self._queue)
        self._run_queue = RunQueue(redis_url)
        self._loop = loop
        self._execute = execute
        self._cancel = cancel
        self._loop_silence = loop_silence
        self._slots = threading.Semaphore(slots)
        self._running: dict[Rest, tuple[Job, Opened]] = {}
        """The runs in execution, by their futures: Redis may hold an id twice."""
        self._books = Books(
            self,
            self._queue,
            self._run_queue,
            is_stopping=self._is_stopping,
            is_idle=lambda: not self._running,
        )
        self._next_heartbeat = 0.0
        self._next_execution_heartbeat = time.monotonic() + EXECUTION_HEARTBEAT_SECONDS

    # -- what the process calls

    @property
    def busy(self) -> int:
        """Slots in use: runs in execution. From any thread."""
        return len(self._running)

    def stop(self) -> None:
        """Take no more jobs. `work()` returns when the runs in execution have come to rest. From any thread."""
        self._stop_requested = True

    def let_go(self, run_id: UUID, priority: Priority) -> None:
        """The run was handed back although its task goes on: enqueue it again, and do not wait for the task.

        From the event loop.
        """
        for future, (job, opened) in list(self._running.items()):
            if job.id == str(run_id):
                handed_back: Rest = Future()
                handed_back.set_result(priority)
                self._rested(future, job, opened, handed_back)

    def _is_stopping(self) -> bool:
        return self._stop_requested

    # -- the feeding thread

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """The next job, with a slot taken for it; None once the worker is to stop."""
        self.set_state(WorkerStatus.IDLE)
        while not self._is_stopping():
            self.heartbeat()
            if self._state == WorkerStatus.BUSY and not self._running:
                self.set_state(WorkerStatus.IDLE)  # a run may still have been in the way when its books were closed
            if self._loop_silence() >= SILENCE_SECONDS:
                time.sleep(SILENT_PAUSE_SECONDS)
                continue
            if self.should_run_maintenance_tasks:
                self.run_maintenance_tasks()
            if self._is_suspended():
                time.sleep(DEQUEUE_SECONDS)
                continue
            if not self._slots.acquire(timeout=DEQUEUE_SECONDS):
                continue
            job = self._jobs.pop()
            if job is not None and not self._is_stopping():
                return job, self._queue
            self._slots.release()
            if job is not None:
                self._jobs.put_back(job)
        return None

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Schedule the run and return. Its slot is free again when it has come to rest."""
        future: Rest = asyncio.run_coroutine_threadsafe(self._execute(UUID(job.id)), self._loop)
        # failpoint: after_schedule
        opened = self._books.open(job)
        self._running[future] = job, opened
        future.add_done_callback(lambda _: self._rested(future, job, opened, future))

    def _rested(self, future: Rest, job: Job, opened: Opened, rest: Rest) -> None:
        if future not in self._running:
            return  # let go before
        try:
            self._books.close(job, opened, rest)
        finally:
            del self._running[future]  # after that, `teardown` may end the bookkeeping
            self._slots.release()

    def teardown(self) -> None:
        """Wait for the runs in execution, finish their bookkeeping, and take leave."""
        while self._running:
            time.sleep(0.02)
        self._books.finish()
        try:
            super().teardown()  # type: ignore[no-untyped-call]
        except RedisError as error:
            logger.warning("left without saying goodbye to Redis", extra={"fields": {"error": str(error)}})
        self._run_queue.close()

    # -- RQ's own behaviour, adapted to many runs and to a Redis that comes and goes

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """Tell Redis that this worker lives: at most every two seconds, and only while the event loop does."""
        if pipeline is not None:
            super().heartbeat(WORKER_TTL_SECONDS, pipeline)
            return
        now = time.monotonic()
        if now < self._next_heartbeat or self._loop_silence() >= WEDGED_SECONDS:
            return
        self._next_heartbeat = now + HEARTBEAT_SECONDS
        if now >= self._next_execution_heartbeat:
            self._next_execution_heartbeat = now + EXECUTION_HEARTBEAT_SECONDS
            self._books.keep_current()
        try:
            with self.connection.pipeline() as look:
                look.sismember(self.redis_workers_keys, self.key)
                look.hexists(self.key, "birth")
                look.hget(self.key, "state")
                is_registered, was_born, state = look.execute()
            if not (is_registered and was_born):
                self._register_again()
            elif state is not None and state.decode() != self._state:
                self.set_state(self._state)  # two threads tell Redis of it, and may come in another order than here
            super().heartbeat(WORKER_TTL_SECONDS)
        except RedisError as error:
            logger.warning("heartbeat to Redis failed", extra={"fields": {"error": str(error)}})

    def _register_again(self) -> None:
        """Redis was flushed, or thought us dead."""
        with self.connection.pipeline() as pipeline:
            pipeline.hset(self.key, mapping=self.serialize())
            worker_registration.register(self, pipeline)
            pipeline.execute()
        self.set_state(self._state)

    def set_state(self, state: str, pipeline: Pipeline | None = None) -> None:
        """Busy while anything runs, whatever the feeding thread is doing."""
        if state == WorkerStatus.IDLE and self._running:
            state = WorkerStatus.BUSY
        try:
            super().set_state(state, pipeline)
        except RedisError as error:
            logger.warning("state not told to Redis", extra={"fields": {"error": str(error)}})

    def _is_suspended(self) -> bool:
        """Is `rq suspend` in force? Then no jobs are taken; runs in execution go on."""
        try:
            suspended = bool(is_suspended(self.connection))  # told who asks, it sends a heartbeat as well
        except RedisError as error:
            logger.warning("suspension unknown", extra={"fields": {"error": str(error)}})
            return False
        if suspended != (self._state == WorkerStatus.SUSPENDED):
            self.set_state(WorkerStatus.SUSPENDED if suspended else WorkerStatus.IDLE)
        return suspended

    def check_for_suspension(self, burst: bool) -> None:
        """RQ waits here without a heartbeat; we look between two pops instead."""

    def register_birth(self) -> None:
        """A namesake in Redis is this very process, before it lost its connection."""
        self.connection.delete(self.key)
        super().register_birth()  # type: ignore[no-untyped-call]

    def run_maintenance_tasks(self) -> None:
        """Forget dead workers. What they left of their runs is the sweeper's business, not RQ's: it asks Postgres."""
        try:
            worker_registration.clean_worker_registry(self._queue)
        except RedisError as error:
            logger.warning("RQ maintenance failed", extra={"fields": {"error": str(error)}})
        self.last_cleaned_at = _rq_now()  # type: ignore[assignment]

    def _job_ids(self) -> set[str]:
        """The jobs in execution."""
        return {job.id for job, _ in list(self._running.values())}

    def handle_payload(self, message: dict[str, Any]) -> None:
        """Commands of `rq` (on the pubsub thread): stop-job works for every run in execution, not only the first."""
        payload = parse_payload(message)
        job_id = payload.get("job_id")
        if payload["command"] in ("stop-job", "stop-execution"):
            if job_id in self._job_ids():
                asyncio.run_coroutine_threadsafe(self._cancel(UUID(job_id)), self._loop)
            return
        super().handle_payload(message)  # type: ignore[no-untyped-call]

    def _pubsub_exception_handler(self, exc: Exception, pubsub: PubSub, pubsub_thread: PubSubWorkerThread) -> None:
        """The thread that hears commands outlives a Redis that is away and a command that nobody understands."""
        if not self._is_stopping():
            logger.warning("a command was not heard", extra={"fields": {"error": str(exc)}})
            time.sleep(RECONNECT_SECONDS)

    def _install_signal_handlers(self) -> None:
        """Signals belong to the main thread, and that is the event loop's."""

    @property
    def dequeue_timeout(self) -> int:
        return DEQUEUE_SECONDS

    @property
    def connection_timeout(self) -> int:
        return REDIS_TIMEOUT_SECONDS
