"""How the whole service stands, as the database says."""

from collections.abc import Sequence

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import audit, gauges, leases, reviews, runs
from app.db.gauges import ServiceState, read_state
from app.domain.review import Decision, ReviewKind, ReviewQueue
from app.domain.run import Claim, RunStatus
from tests.db.test_transitions import claimed, in_state, play
from tests.waiting import limit_request, request, wait_for

QUEUED, RUNNING, WAITING = RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.WAITING
FIRST, SECOND = ReviewQueue.FIRST, ReviewQueue.SECOND


async def change(db: AsyncConnection, held: Claim, what: str) -> None:
    await db.execute(text(f"UPDATE runs SET {what} WHERE id = :id"), {"id": held.run.id})


async def seal(db: AsyncConnection) -> None:
    """Everything that there is, as the sealer would mark it; only the tables' owner may do it without a checkpoint."""
    await db.execute(text("UPDATE audit_heads SET is_sealed = true"))


def is_near(found: float, seconds: float) -> bool:
    return seconds <= found < seconds + 5


def test_where_nothing_happens_everything_is_zero(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        assert await read_state(db) == ServiceState(
            runs={},
            oldest_queued_s=0,
            stuck_runs=0,
            reviews={},
            oldest_review_s=0,
            unsealed_runs=0,
            oldest_unsealed_s=0,
            unanchored_checkpoints=0,
        )

    play(database_url, scenario)


def test_open_runs_are_counted_by_agent_and_state_and_ended_ones_are_not(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        for status in RunStatus:
            await in_state(db, status)
        await claimed(db)
        await wait_for(db, agent="b")
        state = await read_state(db)
        assert state.runs == {("a", QUEUED): 1, ("a", RUNNING): 2, ("a", WAITING): 1, ("b", WAITING): 1}
        assert state.stuck_runs == 0

    play(database_url, scenario)


def test_the_oldest_queued_run_is_the_one_that_was_queued_first_and_not_the_one_that_was_accepted_first(
    database_url: str,
) -> None:
    async def scenario(db: AsyncConnection) -> None:
        accepted_first, other = await in_state(db, QUEUED), await in_state(db, QUEUED)
        await change(db, accepted_first, "created_at = now() - interval '1 day'")
        await change(db, other, "queued_at = now() - interval '100 seconds', agent = 'b'")
        ended = await in_state(db, RunStatus.SUCCEEDED)
        await change(db, ended, "queued_at = now() - interval '200 seconds'")
        assert is_near((await read_state(db)).oldest_queued_s, 100)

    play(database_url, scenario)


STUCK: Sequence[tuple[RunStatus, str, str]] = (
    (
        RUNNING,
        "lease_until = now() - interval '55 seconds'",
        "lease_until = now() - interval '61 seconds'",
    ),
    (
        RUNNING,
        "active_ms = 200000, running_since = now() - interval '155 seconds'",
        "active_ms = 200000, running_since = now() - interval '161 seconds'",
    ),
    (
        QUEUED,
        "queued_at = now() - interval '3590 seconds'",
        "queued_at = now() - interval '3601 seconds'",
    ),
)


def test_a_run_is_stuck_where_nobody_does_what_should_have_been_done_long_ago(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        for stuck, (status, not_yet, long_ago) in enumerate(STUCK):
            held = await in_state(db, status)
            await change(db, held, not_yet)
            assert (await read_state(db)).stuck_runs == stuck, not_yet
            await change(db, held, long_ago)
            assert (await read_state(db)).stuck_runs == stuck + 1, long_ago

    play(database_url, scenario)


def test_a_run_that_waits_is_stuck_only_where_nobody_is_asked(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        asked_twice = await wait_for(db, request(), request(seq=2))
        first, _ = await reviews.of_run(db, asked_twice)
        assert await reviews.decide(db, first, Decision.APPROVE, actor="k", args_hash=first.args_hash)
        await wait_for(db, request(), request(seq=2))
        state = await read_state(db)
        assert (state.stuck_runs, state.runs) == (0, {("toolbox", WAITING): 2})
        await db.execute(text("UPDATE reviews SET status = 'void' WHERE run_id = :id"), {"id": asked_twice})
        state = await read_state(db)
        assert (state.stuck_runs, state.runs) == (1, {("toolbox", WAITING): 2})

    play(database_url, scenario)


def test_pending_reviews_are_counted_by_queue_and_kind(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        approvals = [await wait_for(db, request()) for _ in range(3)]
        await wait_for(db, limit_request())
        (decided,) = await reviews.of_run(db, approvals[0])
        assert await reviews.decide(db, decided, Decision.APPROVE, actor="k", args_hash=decided.args_hash)
        age = "UPDATE reviews SET queue = 'second', created_at = now() - interval '70 seconds' WHERE run_id = :id"
        await db.execute(text(age), {"id": approvals[1]})
        long_ago = "UPDATE reviews SET created_at = now() - interval '1 day' WHERE status = 'decided'"
        await db.execute(text(long_ago))
        state = await read_state(db)
        assert state.reviews == {
            (FIRST, ReviewKind.APPROVAL): 1,
            (SECOND, ReviewKind.APPROVAL): 1,
            (FIRST, ReviewKind.LIMIT): 1,
        }
        assert is_near(state.oldest_review_s, 70)

    play(database_url, scenario)


def test_an_audit_is_as_old_as_what_was_written_to_it_last(owner_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        sealed, old, older = [await claimed(db) for _ in range(3)]
        await seal(db)
        assert (await read_state(db)).unsealed_runs == 0
        await leases.requeue(db, old, actor="w", why="test")
        await runs.cancel(db, older.run.id, "t", actor="k")
        await db.execute(text("ALTER TABLE audit_events DISABLE TRIGGER USER"))
        for held, seconds in ((sealed, 1000), (older, 40), (old, 30)):
            last = (await audit.events_of(db, held.run.id, "t", after=0, limit=99))[-1].seq
            # What was written before is older, and sealed.
            age = f"UPDATE audit_events SET at = now() - interval '{seconds} s' * (1 + :last - seq) WHERE run_id = :id"
            await db.execute(text(age), {"id": held.run.id, "last": last})
        state = await read_state(db)
        assert state.unsealed_runs == 2
        assert is_near(state.oldest_unsealed_s, 40)

    play(owner_url, scenario)


def test_checkpoints_that_are_not_anchored_are_counted(owner_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        store = "INSERT INTO audit_checkpoints (number, body, signature, anchored_at) VALUES (:number, '{}', '', :at)"
        for number in (1, 2, 3):
            await db.execute(text(store), {"number": number, "at": None})
        await db.execute(text("UPDATE audit_checkpoints SET anchored_at = now() WHERE number = 2"))
        assert (await read_state(db)).unanchored_checkpoints == 2

    play(owner_url, scenario)


def test_runs_that_have_ended_are_not_even_looked_at(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await db.execute(text("SET enable_seqscan = off"))
        plans = []
        for statement in (gauges._RUNS, gauges._REVIEWS, gauges._AUDIT):
            explained = await db.execute(text(f"EXPLAIN {statement.text}"), {"max_unsealed": 1, "oldest": 1})
            plans += [line for (line,) in explained]
        plan = "\n".join(plans)
        assert "Seq Scan" not in plan
        for index in ("runs_queued", "runs_running", "runs_waiting", "reviews_pending", "audit_heads_unsealed"):
            assert index in plan, plan

    play(database_url, scenario)
