"""Runs that go on are put back on the queue in the background, whatever Redis still believes of their earlier jobs."""

import asyncio

import redis

from app.db.engine import make_engine
from app.domain.ids import new_id
from app.domain.run import Priority
from app.enqueuer import Enqueuer
from app.queue import RunQueue


def test_what_is_left_of_the_earlier_job_is_forgotten_and_new_runs_are_enqueued_beside_it(
    database_url: str, redis_url: str
) -> None:
    again, fresh = new_id(), new_id()

    async def put() -> None:
        engine, queue = make_engine(database_url, pool_size=1, application_name="test"), RunQueue(redis_url)
        try:
            enqueuer = Enqueuer(queue, engine)
            enqueuer.put_back(again, Priority.NORMAL)
            enqueuer.put(fresh, Priority.NORMAL)
            async with enqueuer.running():
                pass
        finally:
            queue.close()
            await engine.dispose()

    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        connection.hset(f"rq:job:{again}", "exc_info", "of the worker that suspended it")
        connection.zadd("rq:wip:runs", {f"{again}:1": 9e9})
        asyncio.run(put())
        assert connection.lrange("rq:queue:runs", 0, -1) == [str(fresh), str(again)]
        assert connection.zcard("rq:wip:runs") == 0
        assert not connection.hexists(f"rq:job:{again}", "exc_info")
