"""A Redis that lost many runs is filled again from Postgres."""

import asyncio
from uuid import UUID

import redis
from rq import Queue
from rq.job import Job
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.domain.ids import new_id
from app.domain.run import Priority
from app.queue import JOB_FUNCTION, RunQueue
from tests.worker.test_sweeper import claimed, play, queued
from worker.sweeper import BATCH, SHORT_QUEUE, Sweeper


async def fill(engine: AsyncEngine, count: int) -> list[str]:
    """So many queued runs of a while ago, every thousandth of high priority: their ids, oldest first."""
    statement = text("""
        INSERT INTO runs (id, tenant, api_key_id, request_id, agent, agent_version, input, metadata, limits, priority,
                          request_hash, status, queued_at)
        SELECT (lpad(to_hex(1700000000000 + number), 12, '0') || '70008' || lpad(to_hex(number), 15, '0'))::uuid,
               't', 'k', 'r', 'a', '1', '"hello"', '{}', '{}', CASE WHEN number % 1000 = 0 THEN 1 ELSE 0 END,
               '\\x00', 'queued', now() - interval '1 minute'
        FROM generate_series(1, :count) AS number
        RETURNING id
    """)
    async with engine.connect() as connection:
        return sorted(str(run_id) for run_id in (await connection.execute(statement, {"count": count})).scalars())


def test_a_flushed_redis_is_filled_again_in_one_sweep_in_the_order_of_before(database_url: str, redis_url: str) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        ids = await fill(engine, 2 * BATCH + 1)
        await sweeper.sweep()
        high = ids[999::1000]
        before = [*reversed(high), *(run_id for run_id in ids if run_id not in high)]
        assert queued(redis_url) == before
        await sweeper.sweep()
        assert queued(redis_url) == before
        with redis.Redis.from_url(redis_url) as connection:
            connection.flushdb()
        await sweeper.sweep()
        assert queued(redis_url) == before

    play(database_url, redis_url, scenario)


def test_a_long_queue_is_compared_now_and_then_and_a_short_one_when_the_numbers_differ(
    database_url: str, redis_url: str
) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        ids = await fill(engine, SHORT_QUEUE + 10)
        queue = RunQueue(redis_url)
        with redis.Redis.from_url(redis_url) as connection:
            await sweeper.sweep()
            await sweeper.sweep()  # nothing was missing: it will be a while until it compares again
            connection.lrem("rq:queue:runs", 0, ids[5])
            await sweeper.sweep()
            assert len(queued(redis_url)) == len(ids) - 1
            connection.ltrim("rq:queue:runs", 0, SHORT_QUEUE - 2)
            await sweeper.sweep()
            assert sorted(queued(redis_url)) == ids
            await sweeper.sweep()
            connection.lrem("rq:queue:runs", 0, ids[5])
            queue.note_complete(0.001)
            await asyncio.sleep(0.01)
            await sweeper.sweep()
            assert sorted(queued(redis_url)) == ids
        queue.close()

    play(database_url, redis_url, scenario)


def test_a_lease_that_expires_while_redis_is_filled_is_not_rescued_only_after(
    database_url: str, redis_url: str
) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        count = len(await fill(engine, 16 * BATCH))
        sweeping = asyncio.create_task(sweeper.sweep())
        while not queued(redis_url):
            await asyncio.sleep(0.01)
        lost = await claimed(engine, lease_seconds=0)
        while str(lost.run.id) not in queued(redis_url) and not sweeping.done():
            await asyncio.sleep(0.01)
        assert len(queued(redis_url)) < count
        await sweeping
        assert len(queued(redis_url)) == count + 1

    play(database_url, redis_url, scenario)


def test_more_marked_runs_than_go_in_one_batch_are_enqueued_in_one_sweep(database_url: str, redis_url: str) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        ids = await fill(engine, BATCH + 1)
        async with engine.connect() as connection:
            await connection.execute(text("UPDATE runs SET needs_enqueue = true, queued_at = now()"))
        await sweeper.sweep()
        assert sorted(queued(redis_url)) == ids

    play(database_url, redis_url, scenario)


def test_rq_finds_the_same_in_our_jobs_as_in_one_that_it_has_enqueued_itself(redis_url: str) -> None:
    queue = RunQueue(redis_url)
    new, again, its_own = (str(new_id()) for _ in range(3))
    with redis.Redis.from_url(redis_url) as connection:
        queue.put_back([(UUID(again), Priority.NORMAL)])
        queue.enqueue([(UUID(new), Priority.NORMAL)])
        queue.close()
        [rqs] = Queue.all(connection=connection, serializer="json")
        rqs.enqueue_call(
            JOB_FUNCTION, args=(its_own,), job_id=its_own, timeout=-1, result_ttl=0, description=f"run {its_own}"
        )
        assert rqs.job_ids == [again, new, its_own]
        jobs = {id_: Job.fetch(id_, connection=connection, serializer="json") for id_ in rqs.job_ids}
        assert all(job.created_at and job.enqueued_at for job in jobs.values())
        varying = ("created_at", "enqueued_at", "data", "description")
        fields = {id_: {k: v for k, v in job.to_dict().items() if k not in varying} for id_, job in jobs.items()}
    assert fields[again] == fields[new] == fields[its_own]
    for id_, job in jobs.items():
        assert (job.func_name, job.args, job.description) == (JOB_FUNCTION, [id_], f"run {id_}")


def test_the_queue_knows_every_run_in_it_and_no_stranger(redis_url: str) -> None:
    queue = RunQueue(redis_url)
    ids = [f"00000000-0000-7000-8000-{number:012x}" for number in range(10_001)]
    with redis.Redis.from_url(redis_url) as connection:
        connection.rpush("rq:queue:runs", *ids, b"\xff", "not a run", f"{ids[0]},{ids[0]}", "")
    assert sorted(queue.known_ids().split(",")) == ids
    queue.close()
