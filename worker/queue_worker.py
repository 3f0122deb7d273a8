"""An RQ worker that executes many runs on one event loop.

RQ's `work()` runs in a thread and feeds the loop: take a slot, pop a job, schedule its run, pop the next. `rq info`,
suspend, resume, stop-job and warm shutdown work as with RQ's own workers. What RQ keeps about jobs is bookkeeping, done
by one more thread, off the run's way; Postgres decides what happened, so nothing here is lost when Redis is.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import UUID

from redis import Redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue, worker_registration
from rq.command import parse_payload
from rq.exceptions import DequeueTimeout, NoSuchJobError
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.suspension import is_suspended
from rq.timeouts import BaseDeathPenalty
from rq.utils import now as _rq_now
from rq.worker import BaseWorker, WorkerStatus

from app.domain.errors import QueueUnavailable
from app.domain.run import Priority
from app.queue import QUEUE_NAME, SERIALIZER, RunQueue, forget, job_of, run_id_of

logger = logging.getLogger(__name__)

DEQUEUE_SECONDS = 1
"""How long a pop blocks, and so how soon a stop or a suspension is seen."""
HEARTBEAT_SECONDS = 2.0
EXECUTION_HEARTBEAT_SECONDS = 20.0
MAINTENANCE_SECONDS = 30
WORKER_TTL_SECONDS = 30
REDIS_TIMEOUT_SECONDS = 5.0
RECONNECT_SECONDS = 1.0


class _NoPenalty(BaseDeathPenalty):
    """The run's deadline bounds it; RQ's alarms would fail outside the main thread."""

    def setup_death_penalty(self) -> None: ...

    def cancel_death_penalty(self) -> None: ...


def _connect(redis_url: str, **options: Any) -> Redis:
    return Redis.from_url(
        redis_url,
        socket_timeout=REDIS_TIMEOUT_SECONDS,
        socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        health_check_interval=30,
        **options,
    )


class ConcurrentWorker(BaseWorker):
    """Feeds the event loop with runs.

    `slots`: runs at a time. `execute`: takes a run as far as it goes; a priority means: enqueue it again, with that.
    `cancel`: stops a run for good. `loop_is_alive`: whether the loop gave a sign of life lately.
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
        loop_is_alive: Callable[[], bool],
    ) -> None:
        super().__init__(
            [QUEUE_NAME],
            name=name,
            connection=_connect(redis_url),
            worker_ttl=WORKER_TTL_SECONDS,
            maintenance_interval=MAINTENANCE_SECONDS,
            serializer=SERIALIZER,
            log_job_description=False,
        )
        # A retried BLMOVE whose reply was lost would pop a second job and lose the first.
        self._dequeue_connection = _connect(redis_url, retry=Retry(NoBackoff(), 0))
        self._queue: Queue = self.queues[0]
        self._run_queue = RunQueue(redis_url)
        self._loop = loop
        self._execute = execute
        self._cancel = cancel
        self._loop_is_alive = loop_is_alive
        self._slots = threading.Semaphore(slots)
        self._running: dict[Future[Priority | None], str] = {}
        """The runs in execution, by their futures: Redis may hold an id twice."""
        self._books = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rq-books")
        self._next_heartbeat = 0.0
        self._next_execution_heartbeat = time.monotonic() + EXECUTION_HEARTBEAT_SECONDS

    # -- what the process calls

    def stop(self) -> None:
        """Take no more jobs. `work()` returns when the runs in execution have come to rest. From any thread."""
        self._stop_requested = True

    # -- the feeding thread

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """The next job, with a slot taken for it; None once the worker is to stop."""
        self.set_state(WorkerStatus.IDLE)
        while not self._stop_requested:
            self.heartbeat()
            if self.should_run_maintenance_tasks:
                self.run_maintenance_tasks()
            if self._is_suspended():
                time.sleep(DEQUEUE_SECONDS)
                continue
            if not self._slots.acquire(timeout=DEQUEUE_SECONDS):
                continue
            job = self._pop()
            if job is not None:
                return job, self._queue
            self._slots.release()
        return None

    def _pop(self) -> Job | None:
        try:
            popped = self.queue_class.lmove(self._dequeue_connection, self._queue.key, DEQUEUE_SECONDS)
        except DequeueTimeout:
            return None
        except RedisError as error:
            logger.warning("Redis is away", extra={"fields": {"error": str(error)}})
            self._dequeue_connection.connection_pool.disconnect()
            time.sleep(RECONNECT_SECONDS)
            return None
        job_id = popped[1].decode(errors="replace")
        if run_id_of(job_id) is None:
            logger.warning("not a run", extra={"fields": {"job_id": job_id}})
            self._queue.intermediate_queue.remove(job_id)
            return None
        try:
            return Job.fetch(job_id, connection=self.connection, serializer=SERIALIZER)
        except (NoSuchJobError, RedisError):
            # The id is all that is needed to execute the run.
            return job_of(self._queue, job_id)

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Schedule the run and return. Its slot is free again when it has come to rest."""
        future = asyncio.run_coroutine_threadsafe(self._execute(UUID(job.id)), self._loop)
        self._running[future] = job.id
        begun = self._books.submit(self._begin, job)
        future.add_done_callback(lambda _: self._rested(job, begun, future))

    def _rested(self, job: Job, begun: "Future[Execution | None]", future: "Future[Priority | None]") -> None:
        try:
            self._books.submit(self._end, job, begun, future)
        finally:
            del self._running[future]  # after that, `teardown` may end the bookkeeping
            self._slots.release()

    def teardown(self) -> None:
        """Wait for the runs in execution, finish their bookkeeping, and take leave."""
        while self._running:
            time.sleep(0.02)
        self._books.shutdown(wait=True)
        try:
            super().teardown()  # type: ignore[no-untyped-call]
        except RedisError as error:
            logger.warning("left without saying goodbye to Redis", extra={"fields": {"error": str(error)}})
        self._run_queue.close()

    # -- the bookkeeping thread

    def _begin(self, job: Job) -> Execution | None:
        try:
            execution: Execution = self.prepare_execution(job)
            self.prepare_job_execution(job, remove_from_intermediate_queue=True)
        except RedisError as error:
            logger.warning("RQ bookkeeping failed", extra={"fields": {"run_id": job.id, "error": str(error)}})
            return None
        return execution

    def _end(self, job: Job, begun: "Future[Execution | None]", future: "Future[Priority | None]") -> None:
        """Write to RQ what became of the job, as often as it takes: RQ must not call failed what succeeded."""
        while True:
            try:
                self._close_books(job, begun.result(), future)
            except (RedisError, QueueUnavailable) as error:
                logger.warning("RQ bookkeeping failed", extra={"fields": {"run_id": job.id, "error": str(error)}})
                if self._stop_requested:
                    return
                time.sleep(RECONNECT_SECONDS)
            else:
                return

    def _close_books(self, job: Job, execution: Execution | None, future: "Future[Priority | None]") -> None:
        error = future.exception()
        if execution is None:
            forget(self._queue, job.id)
        elif error is not None:
            self._finalize_failure(job, self._queue, execution, (type(error), error, error.__traceback__))
        else:
            self._remove(job, execution)
        if error is None and (priority := future.result()) is not None:
            self._run_queue.enqueue_again(UUID(job.id), priority)
        if not self._running:
            self.set_state(WorkerStatus.IDLE)

    def _remove(self, job: Job, execution: Execution) -> None:
        """The job is done: it leaves Redis, in one round trip.

        RQ's own `_finalize_success` takes several, for dependents, repeats, callbacks and results, which our jobs do
        not have.
        """
        with self.connection.pipeline() as pipeline:
            self.increment_successful_job_count(pipeline)
            assert job.started_at is not None
            self.increment_total_working_time(_rq_now() - job.started_at, pipeline)
            execution.delete(job, pipeline)
            pipeline.delete(job.key, ExecutionRegistry(job.id, self.connection).key)
            pipeline.execute()
        self.executions.pop(execution.id, None)

    def _maintain_executions(self) -> None:
        for execution in list(self.executions.values()):
            try:
                self.maintain_heartbeats(execution.job, execution)
            except RedisError as error:
                logger.warning("RQ heartbeat failed", extra={"fields": {"error": str(error)}})
                return

    # -- RQ's own behaviour, adapted to many runs and to a Redis that comes and goes

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """Tell Redis that this worker lives: at most every two seconds, and only while the event loop does."""
        if pipeline is not None:
            super().heartbeat(timeout, pipeline)
            return
        now = time.monotonic()
        if now < self._next_heartbeat or not self._loop_is_alive():
            return
        self._next_heartbeat = now + HEARTBEAT_SECONDS
        if now >= self._next_execution_heartbeat:
            self._next_execution_heartbeat = now + EXECUTION_HEARTBEAT_SECONDS
            self._books.submit(self._maintain_executions)
        try:
            if not self.connection.sismember(self.redis_workers_keys, self.key):
                self._register_again()
            super().heartbeat(timeout)
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
            suspended = bool(is_suspended(self.connection, self))
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
        """Forget what dead workers left in Redis. Whether their runs go on is the sweeper's business, not RQ's."""
        try:
            worker_registration.clean_worker_registry(self._queue)
            registry = StartedJobRegistry(QUEUE_NAME, connection=self.connection, serializer=SERIALIZER)
            abandoned = {key.split(":")[0] for key in registry.get_expired_job_ids()}
            for job_id in self._queue.intermediate_queue.get_job_ids():
                first_seen_now = self._queue.intermediate_queue.set_first_seen(job_id)
                if not first_seen_now and self._queue.intermediate_queue.should_be_cleaned_up(job_id):
                    abandoned.add(job_id)
            for job_id in abandoned - set(self._running.values()):
                forget(self._queue, job_id)
        except RedisError as error:
            logger.warning("RQ maintenance failed", extra={"fields": {"error": str(error)}})
        self.last_cleaned_at = _rq_now()  # type: ignore[assignment]

    def handle_payload(self, message: dict[str, Any]) -> None:
        """Commands of `rq` (on the pubsub thread): stop-job works for every run in execution, not only the first."""
        payload = parse_payload(message)
        job_id = payload.get("job_id")
        if payload["command"] in ("stop-job", "stop-execution"):
            if job_id in self._running.values():
                asyncio.run_coroutine_threadsafe(self._cancel(UUID(job_id)), self._loop)
            return
        super().handle_payload(message)  # type: ignore[no-untyped-call]

    def _install_signal_handlers(self) -> None:
        """Signals belong to the main thread, and that is the event loop's."""

    @property
    def dequeue_timeout(self) -> int:
        return DEQUEUE_SECONDS
