"""Each transition from each state: it applies where `TRANSITIONS` allows it, under the right token, nowhere else."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import audit, expiry, leases, rescue, reviews, runs, steps
from app.db.engine import make_engine, transactional
from app.domain.agent import Limits, OnExpiry, ReviewRules
from app.domain.audit import AuditEntry, AuditKind
from app.domain.build import Build
from app.domain.errors import LeaseLost
from app.domain.ids import new_id
from app.domain.review import Decision, ReviewKind, ReviewRequest
from app.domain.run import TRANSITIONS, Claim, NewRun, Priority, RunStatus, RunUsage, StopReason
from app.domain.step import ModelStep, ToolState, ToolStep
from app.domain.tool import Effect
from tests.waiting import AMPLE

INTENT = ToolStep(
    seq=1,
    attempt=1,
    call_id="c",
    tool="pay",
    arguments={},
    effect=Effect.ONCE,
    state=ToolState.INTENDED,
    idempotency_key="k",
)
QUESTION = ReviewRequest(kind=ReviewKind.APPROVAL, seq=1, tool="pay", arguments={}, args_hash="seen", why="it pays")
RULES = ReviewRules(expires_s=3600, on_expiry=OnExpiry.END, four_eyes=False)
REPLIED = [AuditEntry(AuditKind.MODEL_REPLIED)]


def new_run(max_attempts: int = 5) -> NewRun:
    return NewRun(
        id=new_id(),
        tenant="t",
        api_key_id="k",
        agent="a",
        agent_version="1",
        input="hello",
        metadata={},
        limits=Limits(max_attempts=max_attempts),
        priority=Priority.NORMAL,
        idempotency_key=None,
        request_hash=b"",
        request_id="r",
    )


async def claimed(db: AsyncConnection, *, lease_seconds: float = 60, max_attempts: int = 5) -> Claim:
    run = await runs.accept(db, new_run(max_attempts), AMPLE)
    assert run is not None
    return await claim(db, run.id, lease_seconds=lease_seconds)


async def claim(db: AsyncConnection, run_id: UUID, *, lease_seconds: float = 60) -> Claim:
    held = await leases.claim(db, run_id, worker="w", lease_seconds=lease_seconds, build=Build())
    assert held is not None
    return held


async def in_state(db: AsyncConnection, status: RunStatus) -> Claim:
    """A run in this state, with the token of its last claim."""
    if status is RunStatus.QUEUED:
        held = await claimed(db)
        await leases.requeue(db, held, actor="w", why="test")
        return held
    held = await claimed(db)
    match status:
        case RunStatus.WAITING:
            await leases.suspend(db, held, [QUESTION], actor="w", rules=RULES)
        case RunStatus.SUCCEEDED:
            await leases.finish(db, held, StopReason.FINAL_ANSWER, actor="w", output="x")
        case RunStatus.FAILED:
            await leases.finish(db, held, StopReason.MAX_STEPS, actor="w")
        case RunStatus.CANCELLED:
            await runs.cancel(db, held.run.id, "t", actor="k")
    return held


async def status_of(db: AsyncConnection, held: Claim) -> RunStatus:
    run = await runs.get(db, held.run.id, "t")
    assert run is not None
    return run.status


Transition = Callable[[AsyncConnection, Claim], Awaitable[object]]


async def _claim(db: AsyncConnection, held: Claim) -> object:
    return await leases.claim(db, held.run.id, worker="w", lease_seconds=60, build=Build())


async def _resume(db: AsyncConnection, held: Claim) -> object:
    for review in await reviews.of_run(db, held.run.id):
        await reviews.decide(db, review, Decision.APPROVE, actor="k", args_hash="seen")
    return await reviews.resume_run(db, held.run.id, actor="k")


async def _expire(db: AsyncConnection, held: Claim) -> object:
    age = text("UPDATE reviews SET expires_at = now() WHERE run_id = :id AND status = 'pending'")
    await db.execute(age, {"id": held.run.id})
    return await expiry.expire_due(db, limit=10)


TRANSITION: dict[str, Transition] = {
    "claim": _claim,
    "finish": lambda db, held: leases.finish(db, held, StopReason.FINAL_ANSWER, actor="w", output="x"),
    "fail": lambda db, held: leases.finish(db, held, StopReason.DEADLINE, actor="w"),
    "suspend": lambda db, held: leases.suspend(db, held, [QUESTION], actor="w", rules=RULES),
    "requeue": lambda db, held: leases.requeue(db, held, actor="w", why="test"),
    "cancel": lambda db, held: runs.cancel(db, held.run.id, "t", actor="k"),
    "resume": _resume,
    "reject": lambda db, held: reviews.end_run(db, held.run.id, StopReason.REJECTED, actor="k", error="no"),
    "answer": lambda db, held: reviews.end_run(db, held.run.id, StopReason.PERSON_ANSWERED, actor="k", output="x"),
    "expire": _expire,
}


def play(database_url: str, scenario: Callable[[AsyncConnection], Awaitable[object]]) -> None:
    async def run() -> None:
        engine = make_engine(database_url, pool_size=2, application_name="test")
        try:
            async with engine.connect() as connection:
                await scenario(connection)
        finally:
            await engine.dispose()

    asyncio.run(run())


@pytest.mark.parametrize("name", TRANSITION)
def test_a_transition_applies_only_from_where_it_may(database_url: str, name: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        applied = set()
        for before in RunStatus:
            held = await in_state(db, before)
            try:
                await TRANSITION[name](db, held)
            except LeaseLost:
                assert before is not RunStatus.RUNNING
            after = await status_of(db, held)
            if after is not before:
                assert after in TRANSITIONS[before], f"{name}: {before} → {after}"
                applied.add(before)
            numbers = [event.seq for event in await audit.events_of(db, held.run.id, "t", after=0, limit=99)]
            assert numbers == list(range(1, len(numbers) + 1))
        assert applied, name

    play(database_url, scenario)


def test_every_allowed_transition_has_a_function(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        seen = {(RunStatus.RUNNING, RunStatus.QUEUED)}
        for before in RunStatus:
            for transition in TRANSITION.values():
                held = await in_state(db, before)
                try:
                    await transition(db, held)
                except LeaseLost:
                    continue
                seen.add((before, await status_of(db, held)))
        allowed = {(before, after) for before, afters in TRANSITIONS.items() for after in afters}
        assert allowed <= seen

    play(database_url, scenario)


def test_a_stale_worker_can_write_nothing(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        stale = await claimed(db)
        await leases.requeue(db, stale, actor="w", why="test")
        fresh = await claim(db, stale.run.id)
        step = ModelStep(seq=0, attempt=1, model="m")
        writes: list[Callable[[Claim], Awaitable[object]]] = [
            lambda held: leases.record(
                db, held, [step], lease_seconds=60, audit=REPLIED, actor="w", used=RunUsage(model_calls=1)
            ),
            lambda held: leases.suspend(db, held, [QUESTION], actor="w", rules=RULES),
            lambda held: leases.requeue(db, held, actor="w", why="stale"),
            lambda held: leases.finish(db, held, StopReason.FINAL_ANSWER, actor="w", output="stale"),
        ]
        before = await audit.events_of(db, stale.run.id, "t", after=0, limit=99)
        for write in writes:
            with pytest.raises(LeaseLost):
                await write(stale)
            with pytest.raises(LeaseLost):
                await write(replace(fresh, token=uuid4()))
        assert await audit.events_of(db, stale.run.id, "t", after=0, limit=99) == before
        assert await steps.steps_of(db, stale.run.id) == []
        assert await leases.extend(db, {stale.run.id: stale.token}, lease_seconds=60) == {}
        assert await leases.extend(db, {stale.run.id: fresh.token}, lease_seconds=60) == {stale.run.id: True}
        await writes[0](fresh)
        run = await runs.get(db, stale.run.id, "t")
        assert run is not None
        assert run.usage.model_calls == 1

    play(database_url, scenario)


def test_a_result_replaces_its_intent_once_and_a_recorded_step_never_changes(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        held = await claimed(db)
        done = INTENT.model_copy(update={"state": ToolState.SUCCEEDED, "result": "paid"})
        reply = ModelStep(seq=0, attempt=1, model="m", content="first")
        await leases.record(db, held, [reply], lease_seconds=60, audit=REPLIED, actor="w")
        await leases.record(db, held, [INTENT], lease_seconds=60, audit=REPLIED, actor="w")
        await leases.record(db, held, [done], lease_seconds=60, audit=REPLIED, actor="w")
        changed = reply.model_copy(update={"content": "second"})
        await leases.record(db, held, [INTENT, changed], lease_seconds=60, audit=REPLIED, actor="w")
        first, second = await steps.steps_of(db, held.run.id)
        assert isinstance(first, ModelStep)
        assert isinstance(second, ToolStep)
        assert (first.content, second.state, second.result) == ("first", ToolState.SUCCEEDED, "paid")

    play(database_url, scenario)


def test_an_expired_lease_is_rescued_until_the_attempts_are_used_up(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        held = await claimed(db, lease_seconds=0, max_attempts=2)
        kept = await claimed(db)
        requeued, ended = await rescue.rescue_expired(db, limit=10)
        assert (requeued, ended) == ([held.run.id], [])
        await claim(db, held.run.id, lease_seconds=0)
        requeued, ended = await rescue.rescue_expired(db, limit=10)
        assert (requeued, ended) == ([], [held.run.id])
        run = await runs.get(db, held.run.id, "t")
        assert run is not None
        assert (run.status, run.stop_reason, run.attempt) == (RunStatus.FAILED, StopReason.MAX_ATTEMPTS, 2)
        assert await status_of(db, kept) is RunStatus.RUNNING

    play(database_url, scenario)


def test_a_row_that_somebody_holds_is_neither_rescued_nor_waited_for(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        held = await claimed(db, lease_seconds=0)
        engine = make_engine(database_url, pool_size=1, application_name="other")
        try:
            async with transactional(engine).begin() as other:
                await reviews.lock_run(other, held.run.id)
                assert await asyncio.wait_for(rescue.rescue_expired(db, limit=10), 2) == ([], [])
                still = await asyncio.wait_for(leases.extend(db, {held.run.id: held.token}, lease_seconds=0), 2)
                assert still == {held.run.id: False}
            requeued, _ = await rescue.rescue_expired(db, limit=10)
            assert requeued == [held.run.id]
        finally:
            await engine.dispose()

    play(database_url, scenario)


def test_handing_back_does_not_use_up_attempts(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        held = await claimed(db, max_attempts=1)
        for _ in range(5):
            await leases.requeue(db, held, actor="w", why="drain")
            held = await claim(db, held.run.id)
        assert held.run.attempt == 6

    play(database_url, scenario)


def test_the_table_itself_refuses_a_lease_without_a_worker_and_an_end_without_a_reason(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        held = await claimed(db)
        for wrong in ("status = 'succeeded'", "lease_token = NULL", "ended_at = now()", "status = 'paused'"):
            with pytest.raises(IntegrityError):
                await db.execute(text(f"UPDATE runs SET {wrong} WHERE id = :id"), {"id": held.run.id})

    play(database_url, scenario)


def test_one_of_ten_claims_wins(database_url: str) -> None:
    async def race() -> list[Claim | None]:
        engine = make_engine(database_url, pool_size=10, application_name="test")

        async def one(run_id: UUID) -> Claim | None:
            async with engine.connect() as db:
                return await leases.claim(db, run_id, worker="w", lease_seconds=9, build=Build())

        try:
            async with engine.connect() as db:
                run = await runs.accept(db, new_run(), AMPLE)
            assert run is not None
            return await asyncio.gather(*(one(run.id) for _ in range(10)))
        finally:
            await engine.dispose()

    assert len([held for held in asyncio.run(race()) if held]) == 1
