"""The one place that knows how runs are named in Redis. What is in there is a hint; Postgres has the runs.

The RQ job's id is the run's id and its only argument; the serializer is JSON. `unique` makes a second enqueue harmless.
"""

import time
from collections.abc import Sequence
from uuid import UUID

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue
from rq.exceptions import DuplicateJobError
from rq.job import Job

from app.domain.errors import QueueUnavailable
from app.domain.run import Priority

QUEUE_NAME = "runs"
JOB_FUNCTION = "worker.executor.execute_run"
"""What `rq info` shows; the worker does not import it by this name, and the API must not import it at all."""
SERIALIZER = "json"

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

    def enqueue(self, run_id: UUID, priority: Priority = Priority.NORMAL) -> None:
        """Put a run on the queue; one that is there already stays where it is.

        Raises `QueueUnavailable` at once for a while after a failure, so that a dead Redis costs one timeout, not many.
        """
        if time.monotonic() < self._closed_until:
            raise QueueUnavailable("Redis failed a moment ago")
        try:
            self._queue.enqueue_call(
                JOB_FUNCTION,
                args=(str(run_id),),
                job_id=str(run_id),
                unique=True,
                at_front=priority is Priority.HIGH,
                timeout=-1,  # the run's deadline bounds it, not RQ
                result_ttl=0,  # a finished job leaves Redis at once, and its id may be enqueued again
                description=f"run {run_id}",
            )
        except DuplicateJobError:
            return
        except RedisError as error:
            self._closed_until = time.monotonic() + RETRY_AFTER_SECONDS
            raise QueueUnavailable(str(error)) from error

    def missing(self, run_ids: Sequence[UUID]) -> list[UUID]:
        """Those of the runs that Redis does not know.

        Raises `QueueUnavailable`.
        """
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for run_id in run_ids:
                    pipeline.exists(Job.key_for(str(run_id)))
                known = pipeline.execute()
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error
        return [run_id for run_id, exists in zip(run_ids, known, strict=True) if not exists]

    def close(self) -> None:
        self._redis.close()
