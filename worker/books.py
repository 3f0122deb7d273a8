"""What RQ is told about runs: that they are executed, and that they are not any more.

By one thread, one job after the other, so it never delays a run and never happens twice at a time. Postgres decides
what became of a run; this is for `rq info` and dashboards, and nothing is lost when Redis is.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from uuid import UUID

from redis.exceptions import RedisError
from rq import Queue
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job
from rq.utils import now as _rq_now
from rq.worker import BaseWorker, WorkerStatus

from app.domain.errors import QueueUnavailable
from app.domain.run import Priority
from app.queue import RunQueue

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0

Opened = Future[Execution | None]
"""RQ's record of an execution; None where Redis was away."""
Rest = Future[Priority | None]
"""How a run came to rest; a priority: it was handed back, and has to be enqueued again with that."""


class Books:
    """`is_stopping`: Redis is not waited for any more. `is_idle`: no run is in execution."""

    def __init__(
        self,
        worker: BaseWorker,
        queue: Queue,
        run_queue: RunQueue,
        *,
        is_stopping: Callable[[], bool],
        is_idle: Callable[[], bool],
    ) -> None:
        self._worker = worker
        self._queue = queue
        self._run_queue = run_queue
        self._is_stopping = is_stopping
        self._is_idle = is_idle
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rq-books")

    def open(self, job: Job) -> Opened:
        """A run's execution has begun."""
        return self._thread.submit(self._open, job)

    def close(self, job: Job, opened: Opened, rest: Rest) -> None:
        """It has come to rest."""
        self._thread.submit(self._close, job, opened, rest)

    def keep_current(self) -> None:
        """Tell RQ that everything in execution still is."""
        self._thread.submit(self._keep_current)

    def finish(self) -> None:
        """Write down what is still to be written, and no more after that."""
        self._thread.shutdown(wait=True)

    def _open(self, job: Job) -> Execution | None:
        # failpoint: before_books_opened
        try:
            execution: Execution = self._worker.prepare_execution(job)
            self._worker.prepare_job_execution(job, remove_from_intermediate_queue=True)
        except RedisError as error:
            logger.warning("RQ bookkeeping failed", extra={"fields": {"run_id": job.id, "error": str(error)}})
            return None
        return execution

    def _close(self, job: Job, opened: Opened, rest: Rest) -> None:
        """As often as it takes: RQ must not call failed what succeeded."""
        while True:
            try:
                self._write_rest(job, opened.result(), rest)
            except (RedisError, QueueUnavailable) as error:
                logger.warning("RQ bookkeeping failed", extra={"fields": {"run_id": job.id, "error": str(error)}})
                if self._is_stopping():
                    return
                time.sleep(RETRY_SECONDS)
            else:
                return

    def _write_rest(self, job: Job, execution: Execution | None, rest: Rest) -> None:
        error = rest.exception()
        # failpoint: before_books_closed
        if execution is None:
            self._run_queue.forget([UUID(job.id)])
        elif error is not None:
            self._worker._finalize_failure(job, self._queue, execution, (type(error), error, error.__traceback__))
        else:
            self._remove(job, execution)
        # failpoint: after_books_closed
        if error is None and (priority := rest.result()) is not None:
            self._run_queue.enqueue_again(UUID(job.id), priority)
        if self._is_idle():
            self._worker.set_state(WorkerStatus.IDLE)

    def _remove(self, job: Job, execution: Execution) -> None:
        """The job is done: it leaves Redis, in one round trip.

        RQ's own `_finalize_success` takes several, for dependents, repeats, callbacks and results, which our jobs do
        not have.
        """
        worker = self._worker
        with worker.connection.pipeline() as pipeline:
            worker.increment_successful_job_count(pipeline)
            assert job.started_at is not None
            worker.increment_total_working_time(_rq_now() - job.started_at, pipeline)
            execution.delete(job, pipeline)
            pipeline.delete(job.key, ExecutionRegistry(job.id, worker.connection).key)
            pipeline.execute()
        worker.executions.pop(execution.id, None)

    def _keep_current(self) -> None:
        for execution in list(self._worker.executions.values()):
            try:
                self._worker.maintain_heartbeats(execution.job, execution)
            except RedisError as error:
                logger.warning("RQ heartbeat failed", extra={"fields": {"error": str(error)}})
                return
