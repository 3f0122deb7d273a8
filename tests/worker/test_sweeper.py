"""What the sweeper puts right, on a database and a Redis of its own."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
import redis
from prometheus_client import CollectorRegistry
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.db import leases, runs, sweep
from app.db.engine import make_engine, transactional
from app.domain.agent import OnExpiry
from app.domain.build import Build
from app.domain.errors import QueueUnavailable
from app.domain.run import Claim, Priority, Run, RunStatus, StopReason
from app.queue import RunQueue
from app.signals import CANCELLED, RESTED, Signals
from tests.db.test_transitions import new_run
from tests.scripts import Script, audit_of, call, rest, submit
from tests.stack import Stack
from tests.waiting import AMPLE, rules, wait_for
from worker.metrics import WorkerMetrics
from worker.sweeper import Sweeper

Scenario = Callable[[AsyncEngine, Sweeper], Awaitable[None]]


def play(database_url: str, redis_url: str, scenario: Scenario) -> None:
    async def run() -> None:
        engine = make_engine(database_url, pool_size=4, application_name="test")
        queue, signals = RunQueue(redis_url), Signals(redis_url)
        try:
            await scenario(engine, Sweeper(engine, queue, signals, WorkerMetrics(CollectorRegistry(), {}, model=None)))
        finally:
            queue.close()
            await signals.aclose()
            await engine.dispose()

    asyncio.run(run())


async def accepted(engine: AsyncEngine, *, minutes_ago: int = 0) -> Run:
    async with engine.connect() as connection:
        run = await runs.accept(connection, new_run(), AMPLE)
        assert run is not None
        age = text("UPDATE runs SET queued_at = now() - make_interval(mins => :minutes) WHERE id = :id")
        await connection.execute(age, {"minutes": minutes_ago, "id": run.id})
    return run


async def claimed(engine: AsyncEngine, *, lease_seconds: float = 60) -> Claim:
    async with engine.connect() as connection:
        run = await runs.accept(connection, new_run(), AMPLE)
        assert run is not None
        held = await leases.claim(connection, run.id, worker="w", lease_seconds=lease_seconds, build=Build())
        assert held is not None
        return held


async def state_of(engine: AsyncEngine, held: Claim) -> Run:
    async with engine.connect() as connection:
        run = await runs.get(connection, held.run.id, "t")
        assert run is not None
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


def test_what_rq_still_believes_of_an_earlier_job_is_forgotten(database_url: str, redis_url: str) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        run, other = await accepted(engine, minutes_ago=1), await claimed(engine)
        with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
            for run_id in (str(run.id), str(other.run.id)):
                connection.hset(f"rq:job:{run_id}", "exc_info", "the worker died")
                connection.zadd("rq:wip:runs", {f"{run_id}:1": 9e9})
                connection.zadd(f"rq:executions:{run_id}", {"1": 9e9})
                connection.hset(f"rq:execution:{run_id}:1", "worker_name", "dead")
                connection.zadd("rq:failed:runs", {run_id: 9e9})
            await sweeper.sweep()
            assert queued(redis_url) == [str(run.id)]
            assert not connection.hexists(f"rq:job:{run.id}", "exc_info")
            left = [str(key) for key in connection.scan_iter("rq:execution*")]
            assert sorted(left) == [f"rq:execution:{other.run.id}:1", f"rq:executions:{other.run.id}"]
            assert connection.zrange("rq:wip:runs", 0, -1) == [f"{other.run.id}:1"]
            assert connection.zrange("rq:failed:runs", 0, -1) == [str(other.run.id)]

    play(database_url, redis_url, scenario)


def test_runs_that_ended_are_not_in_execution_for_redis_either(database_url: str, redis_url: str) -> None:
    """Their worker died between the commit and Redis."""

    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        long_ago, just_now, running = [await claimed(engine) for _ in range(3)]
        async with engine.connect() as connection:
            for ended in (long_ago, just_now):
                await leases.finish(connection, ended, StopReason.FINAL_ANSWER, actor="w")
            age = text("UPDATE runs SET ended_at = now() - interval '1 minute' WHERE id = :id")
            await connection.execute(age, {"id": long_ago.run.id})
        with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
            for claim in (long_ago, just_now, running):
                connection.hset(f"rq:job:{claim.run.id}", "status", "started")
                connection.zadd("rq:wip:runs", {f"{claim.run.id}:1": 9e9})
                connection.zadd("rq:failed:runs", {str(claim.run.id): 9e9})
            connection.rpush("rq:queue:runs:intermediate", str(long_ago.run.id), "not a run")
            await sweeper.sweep()
            left = {f"{claim.run.id}:1" for claim in (just_now, running)}
            assert set(connection.zrange("rq:wip:runs", 0, -1)) == left
            assert len(connection.zrange("rq:failed:runs", 0, -1)) == 2
            assert not connection.exists(f"rq:job:{long_ago.run.id}")
            assert connection.lrange("rq:queue:runs:intermediate", 0, -1) == ["not a run"]

    play(database_url, redis_url, scenario)


def test_a_run_that_was_handed_back_is_enqueued_by_the_next_sweep_once(database_url: str, redis_url: str) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        drained, dead = await claimed(engine), await claimed(engine, lease_seconds=0)
        async with engine.connect() as connection:
            await leases.requeue(connection, drained, actor="w", why="drain")
        for _ in range(2):
            await sweeper.sweep()
            assert queued(redis_url) == [str(drained.run.id), str(dead.run.id)]

    play(database_url, redis_url, scenario)


def test_without_redis_leases_are_rescued_all_the_same_and_enqueued_when_it_is_back(
    database_url: str, redis_url: str
) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        lost = await claimed(engine, lease_seconds=0)
        away = "redis://127.0.0.1:1"
        queue, signals = RunQueue(away), Signals(away)
        with pytest.raises(QueueUnavailable):
            await Sweeper(engine, queue, signals, WorkerMetrics(CollectorRegistry(), {}, model=None)).sweep()
        await signals.aclose()
        assert (await state_of(engine, lost)).status is RunStatus.QUEUED
        await sweeper.sweep()
        assert queued(redis_url) == [str(lost.run.id)]

    play(database_url, redis_url, scenario)


def test_who_holds_and_who_waits_for_an_overdue_run_is_told(database_url: str, redis_url: str) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        held, on_time = await claimed(engine), await claimed(engine)
        async with engine.connect() as connection:
            statement = text("UPDATE runs SET running_since = now() - interval '1 day' WHERE id = :id")
            await connection.execute(statement, {"id": held.run.id})
        with redis.Redis.from_url(redis_url) as connection, connection.pubsub() as pubsub:
            pubsub.subscribe(CANCELLED, RESTED)
            for _ in range(2):
                pubsub.get_message(timeout=1)
            await sweeper.sweep()
            told = [pubsub.get_message(timeout=1) for _ in range(2)]
            assert pubsub.get_message(timeout=0.1) is None
        id_ = str(held.run.id).encode()
        assert [(message["channel"].decode(), message["data"]) for message in told] == [(CANCELLED, id_), (RESTED, id_)]
        run = await state_of(engine, held)
        assert (run.status, run.stop_reason) == (RunStatus.FAILED, StopReason.DEADLINE)
        assert (await state_of(engine, on_time)).status is RunStatus.RUNNING

    play(database_url, redis_url, scenario)


def test_runs_whose_reviews_expired_are_told_of_or_put_on_the_queue(database_url: str, redis_url: str) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        async with engine.connect() as connection:
            ending, going_on, escalated = [
                await wait_for(connection, its=rules(expires_s=0, on_expiry=on_expiry)) for on_expiry in OnExpiry
            ]
            still = await wait_for(connection)
        with redis.Redis.from_url(redis_url) as connection, connection.pubsub() as pubsub:
            pubsub.subscribe(RESTED)
            pubsub.get_message(timeout=1)
            await sweeper.sweep()
            message = pubsub.get_message(timeout=1)
            assert (message and message["data"]) == str(ending).encode()
            assert pubsub.get_message(timeout=0.1) is None
        assert queued(redis_url) == [str(going_on)]
        async with engine.connect() as connection:
            states = {run_id: await runs.get(connection, run_id, "t") for run_id in (ending, escalated, still)}
        assert [run and run.status for run in states.values()] == [
            RunStatus.FAILED,
            RunStatus.WAITING,
            RunStatus.WAITING,
        ]

    play(database_url, redis_url, scenario)


def test_many_reviews_that_are_due_at_once_expire_in_one_sweep(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.sweeper.BATCH", 2)

    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        async with engine.connect() as connection:
            waiting = [await wait_for(connection, its=rules(expires_s=0)) for _ in range(5)]
            await sweeper.sweep()
            ended = [await runs.get(connection, run_id, "t") for run_id in waiting]
        assert [run and run.stop_reason for run in ended] == [StopReason.REVIEW_EXPIRED] * 5

    play(database_url, redis_url, scenario)


def test_one_process_sweeps_at_a_time_and_a_frozen_one_does_not_keep_the_others_from_it(
    database_url: str, redis_url: str
) -> None:
    async def scenario(engine: AsyncEngine, sweeper: Sweeper) -> None:
        lost = await claimed(engine, lease_seconds=0)
        frozen = await transactional(engine).connect()
        assert await sweep.try_lock(frozen, idle_seconds=1)
        await sweeper.sweep()
        assert (await state_of(engine, lost)).status is RunStatus.RUNNING
        await asyncio.sleep(1.5)
        await sweeper.sweep()
        assert (await state_of(engine, lost)).status is RunStatus.QUEUED
        with pytest.raises(SQLAlchemyError):
            await sweep.marked_for_enqueue(frozen, limit=1)
        await frozen.close()

    play(database_url, redis_url, scenario)


def test_a_run_whose_tool_does_not_heed_the_deadline_is_ended_by_the_sweeper(
    stack: Stack, client: httpx.Client
) -> None:
    script = Script(stack.model_url, [call("cling", {"seconds": 14})])
    run = submit(client, "toolbox", script.input, limits={"deadline_s": 1})
    ended = rest(client, run, seconds=12)
    assert (ended["status"], ended["stop_reason"]) == ("failed", "deadline")
    assert audit_of(client, run)[-1] == "run.failed"
