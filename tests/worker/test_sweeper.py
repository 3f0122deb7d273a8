"""What the sweeper puts right, on a database and a Redis of its own."""

import asyncio
from collections.abc import Awaitable, Callable

import redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.db import runs
from app.db.engine import make_engine
from app.domain.run import Priority, Run
from app.queue import RunQueue
from app.signals import Signals
from tests.db.test_transitions import new_run
from worker.sweeper import Sweeper

Scenario = Callable[[AsyncEngine, Sweeper], Awaitable[None]]


def play(database_url: str, redis_url: str, scenario: Scenario) -> None:
    async def run() -> None:
        engine = make_engine(database_url, pool_size=4, application_name="test")
        queue, signals = RunQueue(redis_url), Signals(redis_url)
        try:
            await scenario(engine, Sweeper(engine, queue, signals))
        finally:
            queue.close()
            await signals.aclose()
            await engine.dispose()

    asyncio.run(run())


async def accepted(engine: AsyncEngine, *, minutes_ago: int = 0) -> Run:
    async with engine.connect() as connection:
        run = await runs.accept(connection, new_run())
        assert run is not None
        age = text("UPDATE runs SET queued_at = now() - make_interval(mins => :minutes) WHERE id = :id")
        await connection.execute(age, {"minutes": minutes_ago, "id": run.id})
    return run


def queued(redis_url: str) -> list[str]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        ids = connection.lrange("rq:queue:runs", 0, -1)
        assert isinstance(ids, list)
        return ids


def test_a_marked_run_is_enqueued_without_a_grace(database_url: str, redis_url: str) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        marked, fresh = await accepted(engine), await accepted(engine)
        async with engine.connect() as connection:
            await runs.mark_needs_enqueue(connection, [marked.id])
        await sweeper.sweep()
        assert queued(redis_url) == [str(marked.id)]
        assert str(fresh.id) not in queued(redis_url)

    play(database_url, redis_url, scenario)


def test_a_run_that_redis_does_not_know_is_found_also_when_the_numbers_agree(database_url: str, redis_url: str) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        forgotten = await accepted(engine, minutes_ago=1)
        with redis.Redis.from_url(redis_url) as connection:
            connection.rpush("rq:queue:runs", "00000000-0000-7000-8000-000000000000", "not a run")
        await sweeper.sweep()
        assert str(forgotten.id) in queued(redis_url)

    play(database_url, redis_url, scenario)


def test_what_redis_knows_is_left_where_it_is(database_url: str, redis_url: str) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        old = [await accepted(engine, minutes_ago=1) for _ in range(3)]
        queue = RunQueue(redis_url)
        queue.enqueue([(run.id, Priority.NORMAL) for run in old])
        queue.close()
        before = queued(redis_url)
        await sweeper.sweep()
        assert queued(redis_url) == before == [str(run.id) for run in old]

    play(database_url, redis_url, scenario)


def test_a_dead_workers_job_does_not_keep_its_run_out_of_the_queue(database_url: str, redis_url: str) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        run = await accepted(engine, minutes_ago=1)
        queue = RunQueue(redis_url)
        queue.enqueue([(run.id, Priority.NORMAL)])
        queue.close()
        with redis.Redis.from_url(redis_url) as connection:  # popped, and then the worker died
            connection.lmove("rq:queue:runs", "rq:queue:runs:intermediate")
        await sweeper.sweep()
        assert queued(redis_url) == [str(run.id)]
        assert redis.Redis.from_url(redis_url).llen("rq:queue:runs:intermediate") == 0

    play(database_url, redis_url, scenario)
