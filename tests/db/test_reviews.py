"""Reviews in the database: which are listed, what a decision and an expiry lead to, and what happens when both come."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import product
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.db import audit, expiry, leases, rescue, reviews, runs, steps
from app.db.engine import make_engine, transactional
from app.domain.agent import OnExpiry
from app.domain.audit import AuditEntry, AuditKind
from app.domain.review import Decision, Review, ReviewKind, ReviewQueue, ReviewStatus
from app.domain.run import Run, RunStatus, StopReason
from app.domain.step import ToolState, ToolStep
from tests.db.test_transitions import INTENT, REPLIED, RULES, claimed
from tests.waiting import limit_request, request, rules, wait_for

Scenario = Callable[[AsyncEngine, AsyncConnection], Awaitable[None]]
APPROVAL, IN_DOUBT, QUESTION, LIMIT = ReviewKind.APPROVAL, ReviewKind.IN_DOUBT, ReviewKind.QUESTION, ReviewKind.LIMIT
LONG_AGO = "00000000-0000-7000-8000-00000000000a"
A_MINUTE_AGO = "now() - interval '1 minute'"


def play(database_url: str, scenario: Scenario) -> None:
    async def run() -> None:
        engine = make_engine(database_url, pool_size=12, application_name="test")
        try:
            async with engine.connect() as connection:
                await scenario(engine, connection)
        finally:
            await engine.dispose()

    asyncio.run(run())


async def expire(engine: AsyncEngine, *, limit: int = 100) -> expiry.Expired:
    async with transactional(engine).begin() as connection:
        return await expiry.expire_due(connection, limit=limit)


async def make_due(db: AsyncConnection, run_id: UUID, *, seq: int | None = None) -> None:
    """The time of the run's reviews is over, or of the one about this step."""
    statement = text(f"""
        UPDATE reviews SET expires_at = {A_MINUTE_AGO}
        WHERE run_id = :run_id AND status = 'pending' AND (CAST(:seq AS int) IS NULL OR seq = :seq)
    """)
    await db.execute(statement, {"run_id": run_id, "seq": seq})


async def of_run(db: AsyncConnection, run_id: UUID) -> list[Review]:
    """In the order of their steps: ids of the same millisecond have none."""
    return sorted(await reviews.of_run(db, run_id), key=lambda review: review.seq or 0)


async def run_of(db: AsyncConnection, run_id: UUID) -> Run:
    run = await runs.get(db, run_id, "t")
    assert run is not None
    return run


async def events_of(db: AsyncConnection, run_id: UUID) -> list[str]:
    """The kinds of events since the run was suspended."""
    kinds = [event.kind for event in await audit.events_of(db, run_id, "t", after=0, limit=99)]
    return kinds[kinds.index(AuditKind.RUN_SUSPENDED) + 1 :]


async def decide(db: AsyncConnection, review: Review, decision: Decision = Decision.APPROVE) -> Review | None:
    return await reviews.decide(db, review, decision, actor="key:k", args_hash=review.args_hash)


# -- which are listed


def test_each_filter_narrows_the_list_and_together_they_narrow_it_further(database_url: str) -> None:
    async def scenario(_: AsyncEngine, db: AsyncConnection) -> None:
        old = await wait_for(db, request(APPROVAL), agent="one")
        asked = await wait_for(db, request(QUESTION), agent="one")
        other = await wait_for(db, request(QUESTION), agent="two")
        await wait_for(db, request(QUESTION), agent="two", tenant="another")
        age = text(f"UPDATE reviews SET created_at = now() - interval '1 hour', id = '{LONG_AGO}' WHERE run_id = :id")
        await db.execute(age, {"id": old})
        await db.execute(text("UPDATE reviews SET queue = 'second' WHERE run_id = :id"), {"id": other})
        (decided,) = await of_run(db, asked)
        assert await decide(db, decided, Decision.RESPOND)

        async def listed(**where: Any) -> list[UUID]:
            found = await reviews.list_newest(db, "t", reviews.ReviewFilter(**where), limit=10)
            return [review.run_id for review in found]

        assert await listed() == [other, asked, old]
        assert await listed(status=ReviewStatus.PENDING) == [other, old]
        assert await listed(agent="one") == [asked, old]
        assert await listed(kind=QUESTION) == [other, asked]
        assert await listed(queue=ReviewQueue.SECOND) == [other]
        assert await listed(older_than=1800.0) == [old]
        assert await listed(newer_than=1800.0) == [other, asked]
        assert await listed(older_than=7200.0) == await listed(newer_than=0.0) == []
        assert await listed(older_than=0.0) == [other, asked, old]
        assert await listed(status=ReviewStatus.PENDING, agent="one", kind=APPROVAL, older_than=60.0) == [old]
        assert await listed(status=ReviewStatus.DECIDED, queue=ReviewQueue.SECOND) == []
        assert await listed(before=decided.id) == [old]

    play(database_url, scenario)


# -- what an expiry leads to


@pytest.mark.parametrize("kind", [APPROVAL, IN_DOUBT, QUESTION, LIMIT])
def test_by_default_an_expiry_ends_the_run(database_url: str, kind: ReviewKind) -> None:
    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        asked = limit_request() if kind is LIMIT else request(kind)
        late, in_time = await wait_for(db, asked), await wait_for(db)
        await make_due(db, late)
        assert await expire(engine) == expiry.Expired(ended=(late,), reviews=1)
        run = await run_of(db, late)
        assert (run.status, run.stop_reason) == (RunStatus.FAILED, StopReason.REVIEW_EXPIRED)
        assert [review.status for review in await of_run(db, late)] == [ReviewStatus.EXPIRED]
        assert await events_of(db, late) == ["review.expired", "run.failed"]
        assert (await run_of(db, in_time)).status is RunStatus.WAITING
        assert await expire(engine) == expiry.Expired()

    play(database_url, scenario)


@pytest.mark.parametrize("kind", [APPROVAL, QUESTION])
def test_a_call_that_counts_as_rejected_lets_the_run_go_on(database_url: str, kind: ReviewKind) -> None:
    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        run_id = await wait_for(db, request(kind), its=rules(on_expiry=OnExpiry.REJECT))
        await make_due(db, run_id)
        assert await expire(engine) == expiry.Expired(queued=(run_id,), reviews=1)
        assert (await run_of(db, run_id)).status is RunStatus.QUEUED
        (review,) = await of_run(db, run_id)
        assert (review.status, review.decision) == (ReviewStatus.EXPIRED, None)
        assert await events_of(db, run_id) == ["review.expired", "run.requeued"]
        marked = await db.execute(text("SELECT needs_enqueue FROM runs WHERE id = :id"), {"id": run_id})
        assert marked.scalar_one() is True

    play(database_url, scenario)


@pytest.mark.parametrize("kind", [IN_DOUBT, LIMIT])
def test_what_silence_cannot_reject_ends_the_run(database_url: str, kind: ReviewKind) -> None:
    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        asked = limit_request() if kind is LIMIT else request(kind)
        run_id = await wait_for(db, asked, its=rules(on_expiry=OnExpiry.REJECT))
        await make_due(db, run_id)
        assert await expire(engine) == expiry.Expired(ended=(run_id,), reviews=1)

    play(database_url, scenario)


@pytest.mark.parametrize("kind", [APPROVAL, IN_DOUBT, QUESTION, LIMIT])
def test_a_second_queue_has_as_long_again_and_after_that_the_run_ends(database_url: str, kind: ReviewKind) -> None:
    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        asked = limit_request() if kind is LIMIT else request(kind)
        run_id = await wait_for(db, asked, its=rules(on_expiry=OnExpiry.ESCALATE, expires_s=600))
        (first,) = await of_run(db, run_id)
        await make_due(db, run_id)
        assert await expire(engine) == expiry.Expired(reviews=1)
        (second,) = await of_run(db, run_id)
        assert (second.status, second.queue) == (ReviewStatus.PENDING, ReviewQueue.SECOND)
        assert abs((second.expires_at - first.expires_at).total_seconds()) < 60
        assert await events_of(db, run_id) == ["review.escalated"]
        (event,) = (await audit.events_of(db, run_id, "t", after=0, limit=99))[-1:]
        assert (event.actor, event.data) == ("sweeper", {"id": str(first.id), "queue": "second"})
        assert await decide(db, first) is None, "what the first queue was shown is not for it to decide any more"
        assert await expire(engine) == expiry.Expired()
        await make_due(db, run_id)
        assert await expire(engine) == expiry.Expired(ended=(run_id,), reviews=1)
        assert await events_of(db, run_id) == ["review.escalated", "review.expired", "run.failed"]

    play(database_url, scenario)


def test_a_run_goes_on_only_when_nothing_is_pending_any_more(database_url: str) -> None:
    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        its = rules(on_expiry=OnExpiry.REJECT)
        run_id = await wait_for(db, request(seq=1), request(seq=2), its=its)
        await make_due(db, run_id, seq=1)
        assert await expire(engine) == expiry.Expired(reviews=1)
        assert (await run_of(db, run_id)).status is RunStatus.WAITING
        assert await expire(engine) == expiry.Expired()
        await make_due(db, run_id)
        assert await expire(engine) == expiry.Expired(queued=(run_id,), reviews=1)
        assert await events_of(db, run_id) == ["review.expired", "review.expired", "run.requeued"]

    play(database_url, scenario)


def test_one_review_that_ends_the_run_leaves_nothing_to_decide(database_url: str) -> None:
    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        its = rules(on_expiry=OnExpiry.REJECT)
        run_id = await wait_for(db, request(seq=1), request(IN_DOUBT, seq=2), request(seq=3), its=its)
        await make_due(db, run_id, seq=1)
        await make_due(db, run_id, seq=2)
        assert await expire(engine) == expiry.Expired(ended=(run_id,), reviews=2)
        statuses = [review.status for review in await of_run(db, run_id)]
        assert statuses == [ReviewStatus.EXPIRED, ReviewStatus.EXPIRED, ReviewStatus.VOID]
        assert await events_of(db, run_id) == ["review.expired", "review.expired", "run.failed"]

    play(database_url, scenario)


def test_many_that_are_due_are_expired_in_batches(database_url: str) -> None:
    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        run_ids = [await wait_for(db) for _ in range(5)]
        for run_id in run_ids:
            await make_due(db, run_id)
        found = [await expire(engine, limit=2) for _ in range(4)]
        assert [len(expired.ended) for expired in found] == [2, 2, 1, 0]
        assert sorted(run_id for expired in found for run_id in expired.ended) == sorted(run_ids)

    play(database_url, scenario)


# -- races


def test_a_decision_at_the_last_moment_is_seen_by_the_expiry_that_has_begun(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expiry finds the run before the decision is committed, and gets hold of it after that."""
    lingering = str(expiry._LOCK).replace("SKIP LOCKED", "")  # the window between the two, held open
    monkeypatch.setattr(expiry, "_LOCK", text(lingering))

    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        run_id = await wait_for(db, request(seq=1), request(seq=2))
        soon = text("UPDATE reviews SET expires_at = now() + interval '0.3 seconds' WHERE run_id = :id AND seq = 1")
        await db.execute(soon, {"id": run_id})
        review = (await of_run(db, run_id))[0]
        async with transactional(engine).begin() as reviewer:
            await reviews.lock_run(reviewer, run_id)
            await asyncio.sleep(0.5)
            expiring = asyncio.create_task(expire(engine))
            await asyncio.sleep(0.3)
            assert not expiring.done()
            assert await decide(reviewer, review)
            assert await reviews.resume_run(reviewer, run_id, actor="key:k") is None
        assert await expiring == expiry.Expired()
        assert (await run_of(db, run_id)).status is RunStatus.WAITING
        assert [review.status for review in await of_run(db, run_id)] == [ReviewStatus.DECIDED, ReviewStatus.PENDING]
        assert await events_of(db, run_id) == ["review.decided"]

    play(database_url, scenario)


def test_a_run_that_somebody_holds_is_neither_expired_nor_waited_for(database_url: str) -> None:
    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        run_id, free = await wait_for(db), await wait_for(db)
        await make_due(db, run_id)
        await make_due(db, free)
        async with transactional(engine).begin() as other:
            await reviews.lock_run(other, run_id)
            assert (await asyncio.wait_for(expire(engine), 2)).ended == (free,)
        assert (await expire(engine)).ended == (run_id,)

    play(database_url, scenario)


@pytest.mark.parametrize("sweeps", [False, True])
def test_a_process_that_freezes_while_it_holds_a_run_loses_it(
    database_url: str, monkeypatch: pytest.MonkeyPatch, sweeps: bool
) -> None:
    for module in (reviews, expiry):
        monkeypatch.setattr(module, "LOCK_IDLE_SECONDS", 0.5)

    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        run_id = await wait_for(db)
        await make_due(db, run_id)
        frozen = await transactional(engine).connect()
        await (expiry.expire_due(frozen, limit=10) if sweeps else reviews.lock_run(frozen, run_id))
        await asyncio.sleep(1)
        assert (await asyncio.wait_for(expire(engine), 2)).ended == (run_id,)
        await frozen.invalidate()
        await frozen.close()

    play(database_url, scenario)


def test_what_a_worker_asks_while_its_run_is_cancelled_is_void(database_url: str) -> None:
    """The cancel waits for the row that the worker's statement holds, and cannot see what that has asked."""

    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        held = await claimed(db)
        async with transactional(engine).begin() as worker:
            await leases.suspend(worker, held, [request()], actor="worker:w", rules=RULES)
            cancelling = asyncio.create_task(runs.cancel(db, held.run.id, "t", actor="key:k"))
            await asyncio.sleep(0.3)
            assert not cancelling.done()
        run = await cancelling
        assert run is not None
        assert run.status is RunStatus.CANCELLED
        assert [review.status for review in await of_run(db, run.id)] == [ReviewStatus.VOID]

    play(database_url, scenario)


def test_what_a_worker_begins_while_its_run_is_cancelled_is_in_doubt(database_url: str) -> None:
    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        held = await claimed(db)
        async with transactional(engine).begin() as worker:
            await leases.record(worker, held, [INTENT], lease_seconds=60, audit=REPLIED, actor="worker:w")
            cancelling = asyncio.create_task(runs.cancel(db, held.run.id, "t", actor="key:k"))
            await asyncio.sleep(0.3)
            assert not cancelling.done()
        assert await cancelling is not None
        (step,) = await steps.steps_of(db, held.run.id)
        assert isinstance(step, ToolStep)
        assert step.state is ToolState.IN_DOUBT

    play(database_url, scenario)


def test_a_review_that_outlived_its_run_goes_when_its_time_is_over(database_url: str) -> None:
    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        run_id = await wait_for(db)
        await runs.cancel(db, run_id, "t", actor="key:k")
        await db.execute(text("UPDATE reviews SET status = 'pending' WHERE run_id = :id"), {"id": run_id})
        await make_due(db, run_id)
        assert await expire(engine) == expiry.Expired()
        assert [review.status for review in await of_run(db, run_id)] == [ReviewStatus.VOID]
        assert await events_of(db, run_id) == ["run.cancelled"]

    play(database_url, scenario)


def test_whatever_appends_to_many_runs_at_once_does_not_get_into_its_own_way(database_url: str) -> None:
    async def scenario(engine: AsyncEngine, db: AsyncConnection) -> None:
        run_ids = [await wait_for(db) for _ in range(40)]
        dead = [(await claimed(db, lease_seconds=0)).run.id for _ in range(40)]
        everything = [*run_ids, *dead]
        for run_id in reversed(everything):  # so that the order in which they are stored is not that of their ids
            await db.execute(text("UPDATE runs SET priority = 1 WHERE id = :id"), {"id": run_id})
        read = AuditEntry(AuditKind.RUN_READ, {"what": "runs"})
        for run_id in run_ids:
            await make_due(db, run_id)

        async def look(backwards: bool) -> None:
            async with engine.connect() as connection:
                for _ in range(10):
                    await audit.append(connection, everything[:: -1 if backwards else 1], read, actor="key:k")

        async def sweep() -> None:
            async with engine.connect() as connection:
                await rescue.rescue_expired(connection, limit=100)
            await expire(engine)

        await asyncio.gather(look(True), look(False), look(True), sweep(), sweep())
        for run_id in everything:
            numbers = [event.seq for event in await audit.events_of(db, run_id, "t", after=0, limit=99)]
            assert numbers == list(range(1, len(numbers) + 1))

    play(database_url, scenario)


# -- that it is cheap


async def rows_read(db: AsyncConnection) -> int:
    """How many rows of `reviews` have been looked at so far."""
    await db.execute(text("SELECT pg_stat_force_next_flush()"))
    counted = text("SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'reviews'")
    return int((await db.execute(counted)).scalar_one())


def test_neither_a_list_nor_a_sweep_reads_what_it_does_not_need(database_url: str, owner_url: str) -> None:
    """Ten thousand wait, a hundred thousand were decided: no statement looks at more than a few hundred."""
    options: dict[str, list[Any]] = {
        "status": [None, ReviewStatus.PENDING, ReviewStatus.DECIDED],
        "agent": [None, "agent1"],
        "kind": [None, APPROVAL, LIMIT],
        "queue": [None, ReviewQueue.SECOND],
        "older_than": [None, 2e9],
        "newer_than": [None, 60.0],
    }

    async def scenario(_: AsyncEngine, db: AsyncConnection) -> None:
        many = text("""
            INSERT INTO reviews (id, tenant, run_id, agent, kind, seq, tool, arguments, args_hash, status, created_at,
                                 expires_at)
            SELECT CAST(lpad(to_hex(1700000000000 + number * 1000), 12, '0') || '70008000000000000000' AS uuid),
                   't', gen_random_uuid(), 'agent' || number % 3,
                   CASE WHEN number % 1000 = 0 THEN 'limit' ELSE 'approval' END, 1, 'pay', '{}', 'x',
                   CASE WHEN number % 11 = 0 THEN 'pending' ELSE 'decided' END,
                   to_timestamp(1700000000 + number), now() + interval '1 day'
            FROM generate_series(1, 110000) AS series (number)
        """)
        await db.execute(many)
        owner = make_engine(owner_url, pool_size=1, application_name="test")
        async with owner.connect() as connection:
            await connection.execute(text("VACUUM ANALYZE reviews"))
        await owner.dispose()

        found = 0
        for values in product(*options.values()):
            where = reviews.ReviewFilter(**dict(zip(options, values, strict=True)))
            before = await rows_read(db)
            found += len(await reviews.list_newest(db, "t", where, limit=51))
            assert await rows_read(db) - before < 500, where
        assert found > 250
        before = await rows_read(db)
        assert await expiry.expire_due(db, limit=1_000) == expiry.Expired()
        assert await rows_read(db) == before

    play(database_url, scenario)
