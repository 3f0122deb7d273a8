"""The one place that knows how runs are named in Redis. What is in there is a hint; Postgres has the runs.

The RQ job's id is the run's id and its only argument; the serializer is JSON. `result_ttl=0`: a finished job leaves
Redis at once, so that its id may be enqueued again.
"""

import json
import re
import time
from collections.abc import Iterable, Sequence
from typing import cast
from uuid import UUID

from redis import Redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job, JobStatus
from rq.utils import now, utcformat

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

_COMPLETE_KEY = "agent-service:queue-complete"
_PAGE = 5_000
_RUN_ID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

_RUN = "RUN_ID"
"""Stands for a run's id."""
_NOW = "NOW"
"""Stands for the time at which it is enqueued."""
_ENQUEUE = f"""
    local push, queue, prefix, job = ARGV[1], ARGV[2], ARGV[3], cjson.decode(ARGV[4])
    local fields, of_the_run = {{}}, {{}}
    for name, value in pairs(job) do
        fields[#fields + 1] = name
        fields[#fields + 1] = value
        if string.find(value, '{_RUN}') then of_the_run[#fields] = value end
    end
    for number = 5, #ARGV do
        for place, value in pairs(of_the_run) do fields[place] = (string.gsub(value, '{_RUN}', ARGV[number])) end
        redis.call('HSET', prefix .. ARGV[number], unpack(fields))
        redis.call(push, queue, ARGV[number])
    end
"""
"""Redis' part: stores a job for each run, made from one, and pushes their ids."""


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
        self._job = _stored_job(self._queue)
        self._closed_until = 0.0

    def enqueue(self, runs: Sequence[tuple[UUID, Priority]]) -> None:
        """Put runs on the queue that were never there, in one round trip.

        Raises `QueueUnavailable`, at once for a while after a failure: a dead Redis costs one timeout, not many.
        """
        if time.monotonic() < self._closed_until:
            raise QueueUnavailable("Redis failed a moment ago")
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                self._push(pipeline, runs)
                pipeline.execute()
        except RedisError as error:
            self._closed_until = time.monotonic() + RETRY_AFTER_SECONDS
            raise QueueUnavailable(str(error)) from error

    def enqueue_again(self, run_id: UUID, priority: Priority = Priority.NORMAL) -> None:
        """Put one run back: see `put_back`.

        Raises `QueueUnavailable`.
        """
        self.put_back([(run_id, priority)])

    def put_back(self, runs: Sequence[tuple[UUID, Priority]]) -> None:
        """Put runs on the queue whose earlier jobs may still be known to RQ, because their workers died or are not done
        with their bookkeeping: what is left of those jobs is forgotten. Two round trips, however many runs.

        A run that is on the queue already is there twice then, and claimed once: finding it in a long queue would cost
        Redis more. Raises `QueueUnavailable`; some of the runs may be on the queue by then.
        """
        try:
            # No transaction: Redis serves others in between, and nothing here has to happen at once.
            with self._redis.pipeline(transaction=False) as pipeline:
                self._forget(pipeline, [str(run_id) for run_id, _ in runs])
                self._push(pipeline, runs)
                pipeline.execute()
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error

    def _push(self, pipeline: Pipeline, runs: Sequence[tuple[UUID, Priority]]) -> None:
        """Redis makes the jobs itself, all like one: made by RQ here, 100,000 would keep this process from its work for
        half a minute.
        """
        job = self._job.replace(_NOW, utcformat(now()))
        pipeline.sadd(self._queue.redis_queues_keys, self._queue.key)
        for push, priority in (("RPUSH", Priority.NORMAL), ("LPUSH", Priority.HIGH)):
            if ids := [str(run_id) for run_id, its in runs if its is priority]:
                pipeline.eval(_ENQUEUE, 0, push, self._queue.key, Job.key_for(""), job, *ids)

    def _forget(self, pipeline: Pipeline, job_ids: Sequence[str]) -> None:
        """Remove every trace of jobs but their place in the queue.

        By their keys: RQ's own `Job.delete` fails for a job one of whose executions has expired.
        """
        intermediate, started = self._queue.intermediate_queue.key, self._queue.started_job_registry.key
        with self._redis.pipeline(transaction=False) as asking:
            asking.lrange(intermediate, 0, -1)
            asking.zrange(started, 0, -1)
            popped, executions = asking.execute()
        left_over = {job_id.encode() for job_id in job_ids}
        for job_id in left_over.intersection(popped):
            pipeline.lrem(intermediate, 0, job_id.decode())
        for execution in executions:
            if execution.partition(b":")[0] in left_over:
                pipeline.zrem(started, execution)
                pipeline.delete(Execution.from_composite_key(execution.decode(), self._redis).key)
        pipeline.delete(
            *(Job.key_for(job_id) for job_id in job_ids),
            *(ExecutionRegistry(job_id, self._redis).key for job_id in job_ids),
        )
        pipeline.zrem(self._queue.failed_job_registry.key, *job_ids)

    def begun_ids(self) -> set[UUID]:
        """The runs that a worker has begun, as RQ knows it: popped, in execution, or failed.

        Raises `QueueUnavailable`.
        """
        try:
            popped = self._queue.intermediate_queue.get_job_ids()
            registries = (self._queue.started_job_registry, self._queue.failed_job_registry)
            members = [cast("list[bytes]", self._redis.zrange(registry.key, 0, -1)) for registry in registries]
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error
        entries = (entry.decode(errors="replace") for registry in members for entry in registry)
        job_ids = {*popped, *(entry.partition(":")[0] for entry in entries)}
        return {run_id for job_id in job_ids if (run_id := run_id_of(job_id)) is not None}

    def forget(self, run_ids: Iterable[UUID]) -> None:
        """Remove every trace of jobs that are nobody's any more: Postgres knows what became of the runs.

        Raises `QueueUnavailable`.
        """
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                self._forget(pipeline, [str(run_id) for run_id in run_ids])
                pipeline.execute()
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error

    def length(self) -> int:
        """How many runs Redis has queued. Raises `QueueUnavailable`."""
        try:
            return int(self._queue.count)
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error

    def known_ids(self) -> str:
        """The ids of all runs that Redis has queued, joined by commas, as Postgres takes them.

        Raises `QueueUnavailable`.
        """
        known: list[bytes] = []
        last = -1
        try:
            # From the tail, where places are counted from: workers take runs from the head, and none is skipped.
            while page := cast("list[bytes]", self._redis.lrange(self._queue.key, last - _PAGE + 1, last)):
                known += [job_id for job_id in page if _RUN_ID.fullmatch(job_id)]
                last -= _PAGE
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error
        return b",".join(known).decode()

    def note_complete(self, seconds: float) -> None:
        """Redis knows every queued run. It keeps that in mind for so long, or until it is flushed.

        Raises `QueueUnavailable`.
        """
        try:
            self._redis.set(_COMPLETE_KEY, 1, px=int(seconds * 1000))
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error

    def is_complete(self) -> bool:
        """Was that noted lately, in this Redis? Raises `QueueUnavailable`."""
        try:
            return bool(self._redis.exists(_COMPLETE_KEY))
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error

    def close(self) -> None:
        self._redis.close()


def run_id_of(job_id: str) -> UUID | None:
    """The run of a job, or None: somebody put something else into our queue."""
    try:
        return UUID(job_id)
    except ValueError:
        return None


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


def _stored_job(queue: Queue) -> str:
    """A queued job as RQ keeps it in Redis, as JSON, for a run and a time that are yet to be named."""
    job = job_of(queue, _RUN)
    fields = {
        **job.to_dict(),
        "created_at": _NOW,
        "enqueued_at": _NOW,
        "status": JobStatus.QUEUED.value,
        "data": job.data.decode(),  # RQ reads it uncompressed, too
    }
    return json.dumps({name: str(value) for name, value in fields.items()})
