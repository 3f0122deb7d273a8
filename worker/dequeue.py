"""Takes jobs off RQ's queue: one blocking pop at a time, on a connection of its own that retries nothing."""

import logging
import socket
import time
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue
from rq.exceptions import DequeueTimeout, NoSuchJobError
from rq.job import Job

from app.queue import SERIALIZER, job_of, run_id_of

logger = logging.getLogger(__name__)

DEQUEUE_SECONDS = 1
"""How long a pop blocks, and so how soon a stop or a suspension is seen."""
REDIS_TIMEOUT_SECONDS = 5
RECONNECT_SECONDS = 1.0
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}
"""Seconds, the last in milliseconds: a connection that only listens notices that the other host has vanished."""


def connect(redis_url: str, **options: Any) -> Redis:
    """A client for RQ, which gives up after `REDIS_TIMEOUT_SECONDS`."""
    if not redis_url.startswith("unix:"):
        known = {getattr(socket, name): value for name, value in _KEEPALIVE.items() if hasattr(socket, name)}
        options |= {"socket_keepalive": True, "socket_keepalive_options": known}
    return Redis.from_url(
        redis_url,
        socket_timeout=REDIS_TIMEOUT_SECONDS,
        socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        health_check_interval=30,
        **options,
    )


class JobSource:
    """The jobs of a queue, each once."""

    def __init__(self, redis_url: str, queue: Queue) -> None:
        # A retried BLMOVE whose reply was lost would pop a second job and lose the first.
        self._connection = connect(redis_url, retry=Retry(NoBackoff(), 0))
        self._queue = queue

    def pop(self) -> Job | None:
        """The next job; None where none came within `DEQUEUE_SECONDS`, or Redis is away."""
        try:
            popped = Queue.lmove(self._connection, self._queue.key, DEQUEUE_SECONDS)
        except DequeueTimeout:
            return None
        except RedisError as error:
            logger.warning("Redis is away", extra={"fields": {"error": str(error)}})
            self._connection.connection_pool.disconnect()
            time.sleep(RECONNECT_SECONDS)
            return None
        # failpoint: after_pop
        job_id = popped[1].decode(errors="replace")
        if run_id_of(job_id) is None:
            logger.warning("not a run", extra={"fields": {"job_id": job_id}})
            self._remove(job_id)
            return None
        try:
            return Job.fetch(job_id, connection=self._queue.connection, serializer=SERIALIZER)
        except (NoSuchJobError, RedisError):
            # The id is all that is needed to execute the run.
            return job_of(self._queue, job_id)

    def put_back(self, job: Job) -> None:
        """Another worker finds it where it was. If Redis is away, the sweeper finds that it is missing."""
        try:
            with self._queue.connection.pipeline() as pipeline:
                pipeline.lrem(self._queue.intermediate_queue_key, 1, job.id)
                pipeline.lpush(self._queue.key, job.id)
                pipeline.execute()
        except RedisError as error:
            logger.warning("not put back", extra={"fields": {"run_id": job.id, "error": str(error)}})

    def _remove(self, job_id: str) -> None:
        try:
            self._queue.intermediate_queue.remove(job_id)
        except RedisError as error:
            logger.warning("not removed", extra={"fields": {"job_id": job_id, "error": str(error)}})
