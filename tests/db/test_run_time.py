"""Whichever way a run leaves a state, the time that it was in it is counted once, by Postgres' clock."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.api import schemas
from app.db import leases, rescue, reviews, runs
from app.domain.agent import OnExpiry, ReviewRules
from app.domain.run import Claim, Run, RunStatus, RunTime, RunUsage, StopReason
from app.domain.step import ModelStep, Step, ToolState
from tests.db.test_transitions import INTENT, QUESTION, REPLIED, TRANSITION, claim, new_run, play
from tests.waiting import AMPLE

NEAR_MS = 2500
"""What the statements of a test may take on a busy machine; the times that are asked for are seconds."""

_PASS = text("""
    UPDATE runs SET created_at = created_at - passed, queued_at = queued_at - passed,
                    waiting_since = waiting_since - passed, running_since = running_since - passed,
                    lease_until = lease_until - passed, ended_at = ended_at - passed
    FROM make_interval(secs => :seconds) AS passed WHERE id = :id
""")


@dataclass
class Life:
    """A run that is taken from state to state, with time that seems to pass in between."""

    db: AsyncConnection
    held: Claim

    async def passes(self, seconds: float) -> None:
        await self.db.execute(_PASS, {"id": self.held.run.id, "seconds": seconds})

    async def claim(self) -> None:
        self.held = await claim(self.db, self.held.run.id)

    async def does(self, transition: str) -> None:
        await TRANSITION[transition](self.db, self.held)

    async def run(self) -> Run:
        run = await runs.get(self.db, self.held.run.id, "t")
        assert run is not None
        return run

    async def time(self) -> RunTime:
        """Up to now; and of every answer it holds that the parts are not more than the whole."""
        run = await self.run()
        latency = schemas.RunLatency.of(run)
        assert latency.queued + latency.active + latency.human <= latency.total
        assert latency.model + latency.tools <= latency.active
        return run.time_now()


async def accepted(db: AsyncConnection) -> Life:
    run = await runs.accept(db, new_run(), AMPLE)
    assert run is not None
    return Life(db, Claim(run=run, token=run.id))


def is_near(found_ms: int, seconds: float) -> bool:
    return seconds * 1000 <= found_ms < seconds * 1000 + NEAR_MS


def check(time: RunTime, *, queued: float = 0, active: float = 0, human: float = 0) -> None:
    """Of so many seconds."""
    parts = ((time.queued_ms, queued), (time.active_ms, active), (time.human_ms, human))
    assert all(is_near(found, seconds) for found, seconds in parts), time


Story = Callable[[Life], Awaitable[None]]


async def _drained(life: Life) -> None:
    await life.does("requeue")


async def _rescued(life: Life) -> None:
    await life.passes(60)
    await rescue.rescue_expired(life.db, limit=10)


async def _waited(life: Life) -> None:
    await life.does("suspend")
    await life.passes(50)
    await life.does("resume")


async def _rejected_by_nobody(life: Life) -> None:
    rules = ReviewRules(expires_s=3600, on_expiry=OnExpiry.REJECT, four_eyes=False)
    await leases.suspend(life.db, life.held, [QUESTION], actor="w", rules=rules)
    await life.passes(50)
    await life.does("expire")


BACK_TO_THE_QUEUE: dict[str, tuple[Story, float, float]] = {
    "a drain": (_drained, 0, 0),
    "a rescue": (_rescued, 50, 0),  # the lease was over ten seconds before
    "a decision": (_waited, 0, 50),
    "a review that expired": (_rejected_by_nobody, 0, 50),
}


@pytest.mark.parametrize("name", BACK_TO_THE_QUEUE)
def test_time_adds_up_over_attempts(database_url: str, name: str) -> None:
    way, active, human = BACK_TO_THE_QUEUE[name]

    async def scenario(db: AsyncConnection) -> None:
        life = await accepted(db)
        await life.passes(3)
        check(await life.time(), queued=3)
        await life.claim()
        check((await life.run()).time, queued=3)
        await life.passes(10)
        check(await life.time(), queued=3, active=10)
        await way(life)
        check(await life.time(), queued=3, active=10 + active, human=human)
        await life.passes(5)
        check(await life.time(), queued=8, active=10 + active, human=human)
        await life.claim()
        check((await life.run()).time, queued=8, active=10 + active, human=human)
        await life.passes(7)
        await life.does("finish")
        await life.passes(1000)  # nothing of what comes after the end
        ended = await life.run()
        check(ended.time, queued=8, active=17 + active, human=human)
        assert ended.time_now() == ended.time
        assert is_near(schemas.RunLatency.of(ended).total, 25 + active + human + (10 if name == "a rescue" else 0))

    play(database_url, scenario)


async def _given_up(db: AsyncConnection, life: Life) -> object:
    await db.execute(text("UPDATE runs SET lost_leases = 4 WHERE id = :id"), {"id": life.held.run.id})
    await db.execute(text("UPDATE runs SET lease_until = now() WHERE id = :id"), {"id": life.held.run.id})
    return await rescue.rescue_expired(db, limit=10)


async def _overdue(db: AsyncConnection, life: Life) -> object:
    await db.execute(
        text("UPDATE runs SET limits = limits || '{\"deadline_s\": 1}' WHERE id = :id"), {"id": life.held.run.id}
    )
    return await rescue.end_overdue(db, grace_seconds=5, limit=10)


ENDS: dict[str, Callable[[AsyncConnection, Life], Awaitable[object]]] = {
    "finish": lambda db, life: leases.finish(db, life.held, StopReason.FINAL_ANSWER, actor="w", output="x"),
    "fail": lambda db, life: leases.finish(db, life.held, StopReason.DEADLINE, actor="w"),
    "cancel": lambda db, life: runs.cancel(db, life.held.run.id, "t", actor="k"),
    "given up": _given_up,
    "overdue": _overdue,
    "reject": lambda db, life: reviews.end_run(db, life.held.run.id, StopReason.REJECTED, actor="k"),
    "answer": lambda db, life: reviews.end_run(db, life.held.run.id, StopReason.PERSON_ANSWERED, actor="k", output="x"),
    "expire": lambda db, life: TRANSITION["expire"](db, life.held),
}


@pytest.mark.parametrize(
    ("state", "end"),
    [
        ("queued", "cancel"),
        *[("running", end) for end in ("finish", "fail", "cancel", "given up", "overdue")],
        *[("waiting", end) for end in ("cancel", "reject", "answer", "expire")],
    ],
)
def test_an_end_counts_the_state_that_it_ends(database_url: str, state: str, end: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        life = await accepted(db)
        await life.passes(3)
        if state != "queued":
            await life.claim()
            await life.passes(10)
        if state == "waiting":
            await life.does("suspend")
            await life.passes(50)
        before = await life.time()
        await ENDS[end](db, life)
        after = await life.time()
        assert (await life.run()).status.is_terminal
        check(after, queued=3, active=0 if state == "queued" else 10, human=50 if state == "waiting" else 0)
        assert all(
            is_near(getattr(after, part) - getattr(before, part), 0) for part in ("queued_ms", "active_ms", "human_ms")
        )

    play(database_url, scenario)


def test_a_run_that_waits_twice_is_charged_for_both_and_nothing_in_between(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        life = await accepted(db)
        await life.claim()
        for waits in (1, 2):
            await life.does("suspend")
            assert (await life.run()).waiting_since is not None
            await life.passes(20)
            check(await life.time(), human=20 * waits)
            await life.does("resume")
            await life.claim()
        await life.passes(5)
        check(await life.time(), active=5, human=40)
        await life.does("finish")
        check(await life.time(), active=5, human=40)

    play(database_url, scenario)


def test_what_a_run_waited_for_last_is_known_until_a_worker_that_went_on_with_it_lets_go(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        life = await accepted(db)
        await life.claim()
        await life.does("suspend")
        since = (await life.run()).waiting_since
        assert since is not None
        await life.does("resume")
        await life.claim()
        assert (await life.run()).waiting_since == since
        await life.does("requeue")
        assert (await life.run()).waiting_since is None

    play(database_url, scenario)


def test_a_state_that_is_written_again_is_not_left(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        life = await accepted(db)
        await life.passes(5)
        await db.execute(text("UPDATE runs SET status = status"))
        check(await life.time(), queued=5)

    play(database_url, scenario)


def test_calls_of_models_and_tools_count_as_long_as_they_took_together(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        life = await accepted(db)
        await life.claim()
        await life.passes(10)

        async def record(*steps: Step) -> None:
            await leases.record(
                db, life.held, steps, lease_seconds=60, audit=REPLIED, actor="w", used=RunUsage(model_calls=1)
            )

        done = {"state": ToolState.SUCCEEDED, "result": "paid"}
        await record(ModelStep(seq=0, attempt=1, model="m", duration_ms=1200))
        await record(INTENT)
        first, second = (INTENT.model_copy(update={**done, "seq": seq, "duration_ms": 250 * seq}) for seq in (1, 2))
        await record(first, second)
        await record(ModelStep(seq=3, attempt=1, model="m", duration_ms=800))
        time = await life.time()
        assert (time.model_ms, time.tools_ms) == (2000, 500)
        check(time, active=10)
        await life.does("finish")
        time = await life.time()
        assert (time.model_ms, time.tools_ms) == (2000, 500)

    play(database_url, scenario)


def test_parts_that_are_rounded_up_are_not_more_than_the_whole(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        run = await (await accepted(db)).run()
        ended_at = run.created_at + timedelta(milliseconds=1.2)  # 0.6 in the queue, 0.6 in the hands of a worker
        time = RunTime(queued_ms=1, active_ms=1)
        ended = replace(run, status=RunStatus.FAILED, ended_at=ended_at, time=time)
        assert schemas.RunLatency.of(ended).total == 2

    play(database_url, scenario)


def test_what_was_written_while_a_statement_began_is_no_negative_time(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        life = await accepted(db)
        await life.passes(-1)
        assert (await life.run()).time_now().queued_ms == 0

    play(database_url, scenario)


def test_a_wait_that_the_release_before_began_counts_from_nothing(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        life = await accepted(db)
        await life.claim()
        await life.does("suspend")
        await db.execute(text("UPDATE runs SET waiting_since = NULL WHERE id = :id"), {"id": life.held.run.id})
        check(await life.time())
        await life.does("resume")
        check(await life.time())

    play(database_url, scenario)
