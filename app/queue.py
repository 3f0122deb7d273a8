"""The one place that knows how runs are named in Redis. What is in there is a hint; Postgres has the runs.

The RQ job's id is the run's id and its only argument; the serializer is JSON. `result_ttl=0`: a finished job leaves
Redis at once, so that its id may be enqueued again.
"""

import time
from collections.abc import Sequence
from uuid import UUID

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import Job

from app.domain.errors import QueueUnavailable
from app.domain.run import Priority

QUEUE_NAME = "runs"
JOB_FUNCTION = "worker.executor.execute_run"
"""What `rq info` shows; the worker does not import it by this name, and the API must not import it at all."""
SERIALIZER = "json"
NO_TIMEOUT = -1
"""For RQ: the run's own deadline bounds it."""

RETRY_AFTER_SECONDS = 1.0
"""How long a failed Redis is left alone before the next submission tries it again."""
_TIMEOUT_SECONDS = 1.0


class RunQueue:
    """Puts runs on the RQ queue. Blocking; thread-safe."""

    def __init__(self, redis_url: str) -> None:
        self._redis = Redis.from_url(
            redis_url,
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self._queue = Queue(QUEUE_NAME, connection=self._redis, serializer=SERIALIZER)
        self._closed_until = 0.0

    def enqueue(self, runs: Sequence[tuple[UUID, Priority]]) -> None:
        """Put runs on the queue that were never there, in one round trip.

        Raises `QueueUnavailable`, at once for a while after a failure: a dead Redis costs one timeout, not many.
        """
        if time.monotonic() < self._closed_until:
            raise QueueUnavailable("Redis failed a moment ago")
        jobs = [
            Queue.prepare_data(
                JOB_FUNCTION,
                args=(str(run_id),),
                job_id=str(run_id),
                at_front=priority is Priority.HIGH,
                timeout=NO_TIMEOUT,
                result_ttl=0,
                description=f"run {run_id}",
            )
            for run_id, priority in runs
        ]
        try:
            self._queue.enqueue_many(jobs)
        except RedisError as error:
            self._closed_until = time.monotonic() + RETRY_AFTER_SECONDS
            raise QueueUnavailable(str(error)) from error

    def enqueue_again(self, run_id: UUID, priority: Priority = Priority.NORMAL) -> None:
        """Put a run on the queue whose earlier job may still be known to RQ, because its worker died or is not done
        with its bookkeeping: whatever is left of that job is forgotten.

        Raises `QueueUnavailable`.
        """
        try:
            if not self._enqueue(run_id, priority):
                forget(self._queue, str(run_id))
                self._enqueue(run_id, priority)
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error

    def length(self) -> int:
        """How many runs Redis has queued. Raises `QueueUnavailable`."""
        try:
            return int(self._queue.count)
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error

    def run_ids(self) -> set[UUID]:
        """All runs that Redis has queued. Raises `QueueUnavailable`."""
        try:
            return {run_id for job_id in self._queue.get_job_ids() if (run_id := run_id_of(job_id)) is not None}
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error

    def _enqueue(self, run_id: UUID, priority: Priority) -> bool:
        try:
            self._queue.enqueue_call(
                JOB_FUNCTION,
                args=(str(run_id),),
                job_id=str(run_id),
                unique=True,
                at_front=priority is Priority.HIGH,
                timeout=NO_TIMEOUT,
                result_ttl=0,
                description=f"run {run_id}",
            )
        except DuplicateJobError:
            return False
        return True

    def close(self) -> None:
        self._redis.close()


def run_id_of(job_id: str) -> UUID | None:
    """The run of a job, or None: somebody put something else into our queue."""
    try:
        return UUID(job_id)
    except ValueError:
        return None


def forget(queue: Queue, job_id: str) -> None:
    """Remove a job and every trace of it from Redis. Postgres knows what is to become of the run."""
    try:
        Job.fetch(job_id, connection=queue.connection, serializer=SERIALIZER).delete()
    except NoSuchJobError:
        queue.connection.lrem(queue.key, 0, job_id)
    queue.intermediate_queue.remove(job_id)


def job_of(queue: Queue, job_id: str) -> Job:
    """A job made anew for an id whose own job Redis has lost."""
    return Job.create(
        JOB_FUNCTION,
        args=(job_id,),
        id=job_id,
        origin=queue.name,
        timeout=NO_TIMEOUT,
        result_ttl=0,
        description=f"run {job_id}",
        connection=queue.connection,
        serializer=SERIALIZER,
    )
