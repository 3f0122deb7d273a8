"""What the number of workers is decided by, as the database says."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import runs, scaling
from app.db.scaling import read_load
from app.domain.run import RunStatus
from app.domain.scaling import USUAL_RUN_S, Load
from tests.db.test_gauges import change, is_near
from tests.db.test_transitions import claimed, in_state, new_run, play
from tests.waiting import AMPLE


def test_where_nothing_happens_there_is_no_load_and_a_run_takes_what_one_usually_takes(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        nothing = Load(queued=0, running=0, busy_workers=0, median_run_s=USUAL_RUN_S)
        assert await read_load(db) == nothing

    play(database_url, scenario)


def test_runs_are_queued_or_held_or_neither(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        for status in RunStatus:
            await in_state(db, status)
        await runs.accept(db, new_run(), AMPLE)
        load = await read_load(db)
        assert (load.queued, load.running, load.busy_workers) == (2, 1, 1)

    play(database_url, scenario)


def test_a_worker_is_busy_however_many_runs_it_holds(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        held = [await claimed(db) for _ in range(5)]
        await change(db, held[0], "worker = 'another'")
        load = await read_load(db)
        assert (load.running, load.busy_workers) == (5, 2)

    play(database_url, scenario)


def test_the_runs_of_a_worker_that_died_are_queued_and_it_is_not_busy(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        for _ in range(2):
            await change(db, await claimed(db), "worker = 'dead', lease_until = now() - interval '1 second'")
        await claimed(db)
        load = await read_load(db)
        assert (load.queued, load.running, load.busy_workers) == (2, 1, 1)

    play(database_url, scenario)


async def ended(db: AsyncConnection, *, active_s: float, ago: str = "1 minute") -> None:
    held = await in_state(db, RunStatus.SUCCEEDED)
    await change(db, held, f"active_ms = {active_s * 1000}, ended_at = now() - interval '{ago}'")


def test_what_a_run_takes_is_the_median_of_those_that_ended_lately(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await ended(db, active_s=900, ago="16 minutes")
        assert (await read_load(db)).median_run_s == USUAL_RUN_S
        for active_s in (1, 2.5, 600):
            await ended(db, active_s=active_s)
        assert (await read_load(db)).median_run_s == 2.5
        await ended(db, active_s=3.5, ago="14 minutes")
        assert (await read_load(db)).median_run_s == 3.0

    play(database_url, scenario)


def test_until_the_first_has_ended_a_run_takes_what_those_that_run_have_taken_so_far(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        held = [await claimed(db) for _ in range(4)]
        assert (await read_load(db)).median_run_s == USUAL_RUN_S
        for run in held[:2]:
            await change(db, run, "active_ms = 60000, running_since = now() - interval '20 seconds'")
        await change(db, held[2], "active_ms = 900000, lease_until = now() - interval '1 second'")
        assert is_near((await read_load(db)).median_run_s, 80)
        await ended(db, active_s=3)
        assert (await read_load(db)).median_run_s == 3

    play(database_url, scenario)


def test_of_many_that_ended_lately_the_last_two_hundred_count(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        for _ in range(101):
            await ended(db, active_s=1, ago="5 minutes")
        for _ in range(99):
            await ended(db, active_s=2)
        assert (await read_load(db)).median_run_s == 1
        for _ in range(2):
            await ended(db, active_s=2)
        assert (await read_load(db)).median_run_s == 2

    play(database_url, scenario)


def test_a_run_that_no_worker_ever_held_says_nothing_about_how_long_one_takes(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await ended(db, active_s=4)
        for _ in range(3):
            run = await runs.accept(db, new_run(), AMPLE)
            assert run is not None
            await runs.cancel(db, run.id, "t", actor="k")
        assert (await read_load(db)).median_run_s == 4

    play(database_url, scenario)


def test_no_more_is_looked_at_than_has_to_be(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        for way in ("seqscan", "bitmapscan"):  # of an empty table, Postgres thinks that it does not matter
            await db.execute(text(f"SET enable_{way} = off"))
        plan = "\n".join([line for (line,) in await db.execute(text(f"EXPLAIN {scaling._LOAD.text}"))])
        assert "Seq Scan" not in plan
        assert "ended_at DESC" not in plan, "they are read in this order, not put into it"
        for index in ("runs_queued", "runs_running", "runs_ended"):
            assert index in plan, plan

    play(database_url, scenario)
