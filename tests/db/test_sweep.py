"""What the sweeper finds in Postgres: runs past their deadline, and runs marked for Redis."""

from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import audit, leases, rescue, runs, steps, sweep
from app.domain.audit import AuditKind
from app.domain.errors import LeaseLost
from app.domain.run import Claim, RunStatus, StopReason
from app.domain.step import ToolState, ToolStep
from tests.db.test_transitions import INTENT, REPLIED, TRANSITION, claim, claimed, in_state, play, status_of


async def ran_for(db: AsyncConnection, held: Claim, seconds: float, *, lease_seconds: float = 60) -> None:
    """Make it seem that the run was claimed so long ago, or so long before its lease ended."""
    statement = """
        UPDATE runs SET lease_until = now() + make_interval(secs => :lease),
                        running_since = now() + make_interval(secs => least(:lease, 0) - :seconds)
        WHERE id = :id
    """
    await db.execute(text(statement), {"id": held.run.id, "seconds": seconds, "lease": lease_seconds})


async def end_overdue(db: AsyncConnection) -> list[UUID]:
    return list(await rescue.end_overdue(db, grace_seconds=5, limit=10))


def test_a_run_far_past_its_deadline_fails_whoever_holds_it(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        held, young = await claimed(db), await claimed(db)
        deadline_s = held.run.limits.deadline_s
        await leases.record(db, held, [INTENT], lease_seconds=60, audit=REPLIED, actor="w")
        for one in (held, young):
            await ran_for(db, one, deadline_s + 4)
        assert await end_overdue(db) == []
        await ran_for(db, held, deadline_s + 6)
        assert await end_overdue(db) == [held.run.id]
        with pytest.raises(LeaseLost):
            await leases.finish(db, held, StopReason.FINAL_ANSWER, actor="w", output="late")
        run = await runs.get(db, held.run.id, "t")
        assert run is not None
        assert (run.status, run.stop_reason) == (RunStatus.FAILED, StopReason.DEADLINE)
        assert deadline_s + 5 < run.time.active_ms / 1000 < deadline_s + 60
        [step] = await steps.steps_of(db, held.run.id)
        assert isinstance(step, ToolStep)
        assert step.state is ToolState.IN_DOUBT
        last = (await audit.events_of(db, held.run.id, "t", after=0, limit=99))[-1]
        assert (last.kind, last.actor, last.data["stop_reason"]) == (AuditKind.RUN_FAILED, "sweeper", "deadline")
        assert await status_of(db, young) is RunStatus.RUNNING
        assert await end_overdue(db) == []

    play(database_url, scenario)


def test_the_time_of_earlier_claims_counts_towards_the_deadline_and_that_of_a_dead_worker_does_not(
    database_url: str,
) -> None:
    async def scenario(db: AsyncConnection) -> None:
        again, dead, dead_too_late = await claimed(db), await claimed(db), await claimed(db)
        deadline_s = again.run.limits.deadline_s
        await ran_for(db, again, deadline_s - 1)
        await leases.requeue(db, again, actor="w", why="test")
        again = await claim(db, again.run.id)
        await ran_for(db, again, 7)
        await ran_for(db, dead, 7, lease_seconds=-3600)
        await ran_for(db, dead_too_late, deadline_s + 6, lease_seconds=-1)
        assert set(await end_overdue(db)) == {again.run.id, dead_too_late.run.id}
        requeued, _ = await rescue.rescue_expired(db, limit=10)
        assert requeued == [dead.run.id]

    play(database_url, scenario)


async def is_marked(db: AsyncConnection, held: Claim) -> bool:
    statement = text("SELECT needs_enqueue FROM runs WHERE id = :id")
    return bool((await db.execute(statement, {"id": held.run.id})).scalar_one())


def test_who_queues_a_run_again_marks_it_for_the_sweeper_until_it_is_claimed_or_ends(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        drained, decided = await in_state(db, RunStatus.QUEUED), await in_state(db, RunStatus.WAITING)
        assert not await is_marked(db, decided)
        await TRANSITION["resume"](db, decided)
        dead, given_up = await claimed(db, lease_seconds=0), await claimed(db, lease_seconds=0, max_attempts=1)
        await rescue.rescue_expired(db, limit=10)
        assert [await is_marked(db, held) for held in (drained, decided, dead, given_up)] == [True, True, True, False]
        await claim(db, drained.run.id)
        await runs.cancel(db, decided.run.id, "t", actor="k")
        assert [await is_marked(db, held) for held in (drained, decided)] == [False, False]
        assert [run.id for run in await sweep.marked_for_enqueue(db, limit=10)] == [dead.run.id]

    play(database_url, scenario)


def test_a_mark_is_taken_away_only_from_the_stay_in_the_queue_that_it_was_seen_in(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        held = await in_state(db, RunStatus.QUEUED)
        seen = await sweep.marked_for_enqueue(db, limit=10)
        await leases.requeue(db, await claim(db, held.run.id), actor="w", why="test")
        assert await sweep.unmark(db, seen) == 0
        assert await is_marked(db, held)
        assert await sweep.unmark(db, await sweep.marked_for_enqueue(db, limit=10)) == 1
        assert not await is_marked(db, held)

    play(database_url, scenario)
