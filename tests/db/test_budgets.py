"""Budgets in the database: what is reserved, what is settled, and that nothing is lost between the two."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from decimal import Decimal

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.db import budgets, leases, rescue, runs
from app.db.budgets import Budget, Reservation
from app.db.engine import make_engine, transactional
from app.domain.errors import LeaseLost
from app.domain.run import Claim, RunUsage, StopReason
from app.domain.step import ModelStep, Usage
from tests.db.test_transitions import TRANSITION, claim, new_run
from tests.waiting import AMPLE

NOTHING = Decimal(0)
CENT = Decimal("0.01")
DOLLAR = Decimal(1)
Scenario = Callable[[AsyncConnection], Awaitable[None]]
ManyScenario = Callable[[AsyncEngine], Awaitable[None]]


def play(database_url: str, scenario: Scenario) -> None:
    async def with_a_connection(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await scenario(connection)

    play_many(database_url, with_a_connection)


def play_many(database_url: str, scenario: ManyScenario, *, connections: int = 16) -> None:
    async def run() -> None:
        engine = make_engine(database_url, pool_size=connections, application_name="test", pool_timeout_s=60)
        try:
            await scenario(engine)
        finally:
            await engine.dispose()

    asyncio.run(run())


async def claimed(db: AsyncConnection, tenant: str = "t", *, lease_seconds: float = 60) -> Claim:
    run = await runs.accept(db, replace(new_run(), tenant=tenant), AMPLE)
    assert run is not None
    return await claim(db, run.id, lease_seconds=lease_seconds)


async def give(db: AsyncConnection, usd: str, tenant: str = "t") -> None:
    await db.execute(
        text("INSERT INTO budgets (tenant, daily_usd, day) VALUES (:tenant, :usd, (now() AT TIME ZONE 'UTC')::date)"),
        {"tenant": tenant, "usd": Decimal(usd)},
    )


async def budget_of(db: AsyncConnection, tenant: str = "t") -> Budget:
    budget = await budgets.get(db, tenant)
    assert budget is not None
    return budget


async def stand(db: AsyncConnection, tenant: str = "t") -> tuple[Decimal, Decimal]:
    """Spent and reserved."""
    budget = await budget_of(db, tenant)
    return budget.spent, budget.reserved


async def reply(db: AsyncConnection, held: Claim, usd: Decimal | None, *, seq: int = 0) -> None:
    step = ModelStep(
        seq=seq, attempt=1, model="m", content="x", finish_reason="stop", usage=Usage(), cost_usd=usd, tool_calls=()
    )
    used = RunUsage(model_calls=1, cost_usd=usd)
    await leases.record(db, held, [step], lease_seconds=60, audit=[], actor="worker:w", used=used)


async def row_of(db: AsyncConnection, held: Claim) -> tuple[object, ...]:
    statement = text("SELECT ctid::text, xmin::text, xmax::text, reserved_usd FROM runs WHERE id = :id")
    return tuple((await db.execute(statement, {"id": held.run.id})).one())


# -- reserving


def test_for_a_tenant_without_a_budget_nothing_is_written_nor_locked(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        held = await claimed(db)
        await give(db, "1", tenant="somebody else")
        before = await row_of(db, held)
        for usd in (CENT, None):
            assert await budgets.reserve(db, held, usd) is Reservation.UNLIMITED
        assert await row_of(db, held) == before
        assert await stand(db, "somebody else") == (NOTHING, NOTHING)

    play(database_url, scenario)


def test_what_fits_is_reserved_on_the_run_and_in_the_budget(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "0.03")
        one, other = await claimed(db), await claimed(db)
        assert await budgets.reserve(db, one, CENT) is Reservation.MADE
        assert await budgets.reserve(db, other, 2 * CENT) is Reservation.MADE
        assert await stand(db) == (NOTHING, 3 * CENT)
        assert [(await row_of(db, held))[-1] for held in (one, other)] == [CENT, 2 * CENT]

    play(database_url, scenario)


def test_a_second_reservation_of_a_run_takes_the_place_of_its_first(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "0.03")
        held = await claimed(db)
        for usd in (CENT, 3 * CENT, 2 * CENT):
            assert await budgets.reserve(db, held, usd) is Reservation.MADE
            assert await stand(db) == (NOTHING, usd)
        assert await budgets.reserve(db, held, 4 * CENT) is Reservation.SPENT
        assert await stand(db) == (NOTHING, 2 * CENT)

    play(database_url, scenario)


def test_what_would_fit_without_the_others_reservations_is_worth_waiting_for(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "0.03")
        one, other = await claimed(db), await claimed(db)
        assert await budgets.reserve(db, one, 2 * CENT) is Reservation.MADE
        assert await budgets.reserve(db, other, 2 * CENT) is Reservation.BUSY
        assert await stand(db) == (NOTHING, 2 * CENT)
        assert (await row_of(db, other))[-1] == 0
        await reply(db, one, CENT)
        assert await budgets.reserve(db, other, 2 * CENT) is Reservation.MADE
        assert await stand(db) == (CENT, 2 * CENT)
        assert await budgets.reserve(db, one, 3 * CENT) is Reservation.SPENT

    play(database_url, scenario)


def test_a_call_that_nobody_knows_the_price_of_fits_into_no_budget(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "999999")
        held = await claimed(db)
        assert await budgets.reserve(db, held, None) is Reservation.SPENT
        assert await stand(db) == (NOTHING, NOTHING)

    play(database_url, scenario)


async def take_over(db: AsyncConnection, held: Claim) -> object:
    await TRANSITION["requeue"](db, held)
    return await claim(db, held.run.id)


LOSING = {name: TRANSITION[name] for name in ("finish", "suspend", "requeue", "cancel")} | {"taken over": take_over}


@pytest.mark.parametrize("name", LOSING)
def test_whoever_does_not_hold_the_run_any_more_reserves_nothing(database_url: str, name: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "1")
        held = await claimed(db)
        await LOSING[name](db, held)
        with pytest.raises(LeaseLost):
            await budgets.reserve(db, held, CENT)
        await db.execute(text("DELETE FROM budgets"))
        with pytest.raises(LeaseLost):
            await budgets.reserve(db, held, CENT)

    play(database_url, scenario)


def test_nobody_waits_for_the_disk_and_the_next_statement_does(database_url: str) -> None:
    """What the statement says about its commit ends with it."""

    async def scenario(db: AsyncConnection) -> None:
        await give(db, "1")
        held = await claimed(db)
        for _ in range(8):  # also once the driver has prepared it
            assert await budgets.reserve(db, held, CENT) is Reservation.MADE
            assert (await db.execute(text("SHOW synchronous_commit"))).scalar_one() == "on"

    assert "set_config('synchronous_commit', 'off', true)" in budgets._RESERVE.text
    play(database_url, scenario)


def test_of_many_at_once_exactly_as_many_get_room_as_there_is(database_url: str) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect() as db:
            await give(db, "0.20")
            held = [await claimed(db) for _ in range(50)]

        async def reserve(one: Claim) -> Reservation:
            async with engine.connect() as db:
                return await budgets.reserve(db, one, CENT)

        outcomes = await asyncio.gather(*(reserve(one) for one in held))
        assert [outcomes.count(outcome) for outcome in (Reservation.MADE, Reservation.BUSY)] == [20, 30]
        async with engine.connect() as db:
            assert await stand(db) == (NOTHING, 20 * CENT)

    play_many(database_url, scenario)


def test_at_no_moment_is_more_spent_and_reserved_than_the_budget(database_url: str) -> None:
    """50 runs call for 3 cents at most, each call costs 2 in the end: 1.00 is enough for 49 calls and no more."""
    seen: list[Decimal] = []

    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect() as db:
            await give(db, "1.00")
            held = [await claimed(db) for _ in range(50)]

        async def call(one: Claim) -> int:
            calls = 0
            while True:
                async with engine.connect() as db:
                    outcome = await budgets.reserve(db, one, 3 * CENT)
                if outcome is Reservation.SPENT:
                    return calls
                if outcome is Reservation.BUSY:
                    await asyncio.sleep(0.01)
                    continue
                async with engine.connect() as db:
                    await reply(db, one, 2 * CENT, seq=calls)
                calls += 1

        async def watch() -> None:
            async with engine.connect() as db:
                while True:
                    seen.append(sum(await stand(db), Decimal(0)))

        watching = asyncio.create_task(watch())
        made = sum(await asyncio.gather(*(call(one) for one in held)))
        watching.cancel()
        assert made == 49
        async with engine.connect() as db:
            assert await stand(db) == (98 * CENT, NOTHING)

    play_many(database_url, scenario)
    assert len(seen) > 20
    assert max(seen) <= 1


def test_a_cancel_that_comes_while_a_reservation_is_made_finds_it(database_url: str) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect() as reserving, engine.connect() as cancelling:
            await give(reserving, "1")
            held = await claimed(reserving)
            async with transactional(engine).begin() as holder:
                await holder.execute(text("SELECT FROM budgets FOR UPDATE"))
                reservation = asyncio.create_task(budgets.reserve(reserving, held, 5 * CENT))
                await asyncio.sleep(0.2)
                cancel = asyncio.create_task(runs.cancel(cancelling, held.run.id, "t", actor="k"))
                await asyncio.sleep(0.2)
                assert not reservation.done()
                assert not cancel.done()
            assert await reservation is Reservation.MADE
            assert await cancel is not None
            assert await stand(reserving) == (5 * CENT, NOTHING)
            assert (await row_of(reserving, held))[-1] == 0

    play_many(database_url, scenario)


def test_a_reservation_that_comes_while_its_run_is_cancelled_is_not_made(database_url: str) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect() as db:
            await give(db, "1")
            held = await claimed(db)
            async with transactional(engine).begin() as cancelling:
                await runs.cancel(cancelling, held.run.id, "t", actor="k")
                reservation = asyncio.create_task(budgets.reserve(db, held, CENT))
                await asyncio.sleep(0.2)
                assert not reservation.done()
            assert await reservation is not Reservation.MADE
            assert await stand(db) == (NOTHING, NOTHING)
            with pytest.raises(LeaseLost):
                await budgets.reserve(db, held, CENT)

    play_many(database_url, scenario)


# -- settling


async def rescue_all(db: AsyncConnection, held: Claim) -> object:
    await db.execute(text("UPDATE runs SET lease_until = now() - interval '1 s' WHERE id = :id"), {"id": held.run.id})
    return await rescue.rescue_expired(db, limit=10)


async def give_up(db: AsyncConnection, held: Claim) -> object:
    await db.execute(text("UPDATE runs SET lost_leases = 100 WHERE id = :id"), {"id": held.run.id})
    return await rescue_all(db, held)


async def end_overdue(db: AsyncConnection, held: Claim) -> object:
    await db.execute(
        text("UPDATE runs SET running_since = now() - interval '1 day' WHERE id = :id"), {"id": held.run.id}
    )
    return await rescue.end_overdue(db, grace_seconds=5, limit=10)


async def stop_for(db: AsyncConnection, held: Claim, reason: StopReason) -> None:
    await leases.finish(db, held, reason, actor="w")


RELEASED = {
    **{name: TRANSITION[name] for name in ("finish", "suspend", "requeue")},
    "model error": lambda db, held: stop_for(db, held, StopReason.MODEL_ERROR),
    "rescue": rescue_all,
    "given up": give_up,
}
BROKEN_OFF = {
    "cancel": TRANSITION["cancel"],
    "deadline": lambda db, held: stop_for(db, held, StopReason.DEADLINE),
    "overdue": end_overdue,
}


@pytest.mark.parametrize("cost", [CENT, None])
@pytest.mark.parametrize("name", RELEASED)
def test_whatever_lets_go_of_a_run_releases_what_it_has_reserved(
    database_url: str, name: str, cost: Decimal | None
) -> None:
    async def scenario(db: AsyncConnection) -> None:
        held, other = await claimed(db), await claimed(db)
        await reply(db, held, cost)  # before there is a budget
        await give(db, "1")
        await budgets.reserve(db, held, 5 * CENT)
        await budgets.reserve(db, other, CENT)
        await RELEASED[name](db, held)
        assert await stand(db) == (NOTHING, CENT)
        assert (await row_of(db, held))[-1] == 0

    play(database_url, scenario)


@pytest.mark.parametrize("name", BROKEN_OFF)
def test_a_call_that_is_broken_off_for_its_caller_counts_as_what_it_may_have_cost(database_url: str, name: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "1")
        held, between_calls = await claimed(db), await claimed(db)
        await budgets.reserve(db, held, 5 * CENT)
        await budgets.reserve(db, between_calls, 5 * CENT)
        await reply(db, between_calls, CENT)
        for one in (held, between_calls):
            await BROKEN_OFF[name](db, one)
        assert await stand(db) == (6 * CENT, NOTHING)
        assert (await row_of(db, held))[-1] == 0

    play(database_url, scenario)


@pytest.mark.parametrize("name", ["queued", "waiting"])
def test_a_run_that_no_worker_holds_is_cancelled_for_nothing(database_url: str, name: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "1")
        held = await claimed(db)
        await budgets.reserve(db, held, 5 * CENT)
        await TRANSITION["requeue" if name == "queued" else "suspend"](db, held)
        await TRANSITION["cancel"](db, held)
        assert await stand(db) == (NOTHING, NOTHING)

    play(database_url, scenario)


def test_a_reply_is_spent_and_the_rest_of_its_reservation_released(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "1")
        held = await claimed(db)
        await budgets.reserve(db, held, 5 * CENT)
        await reply(db, held, CENT)
        assert await stand(db) == (CENT, NOTHING)
        await budgets.reserve(db, held, 5 * CENT)
        await reply(db, held, Decimal(0), seq=1)
        assert await stand(db) == (CENT, NOTHING)

    play(database_url, scenario)


def test_a_reply_without_a_price_counts_as_the_most_that_it_may_have_cost(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "1")
        held = await claimed(db)
        for seq, cost in enumerate((None, CENT)):  # what a run has cost in all is unknown from the first one on
            await budgets.reserve(db, held, 5 * CENT)
            await reply(db, held, cost, seq=seq)
        assert await stand(db) == (10 * CENT, NOTHING)

    play(database_url, scenario)


def test_a_reply_of_a_worker_that_reserves_nothing_counts(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "1")
        await reply(db, await claimed(db), CENT)
        assert await stand(db) == (CENT, NOTHING)

    play(database_url, scenario)


def test_the_results_of_tools_settle_nothing(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "1")
        held = await claimed(db)
        await budgets.reserve(db, held, CENT)
        await leases.record(db, held, [], lease_seconds=60, audit=[], actor="worker:w")
        await leases.extend(db, {held.run.id: held.token}, lease_seconds=60)
        assert await stand(db) == (NOTHING, CENT)

    play(database_url, scenario)


def test_runs_of_several_tenants_are_rescued_together(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        tenants = ["with", "also with", "without"]
        for tenant in tenants[:2]:
            await give(db, "1", tenant)
        for tenant in tenants * 20:
            await budgets.reserve(db, await claimed(db, tenant, lease_seconds=0), CENT)
        assert [await stand(db, tenant) for tenant in tenants[:2]] == [(NOTHING, 20 * CENT)] * 2
        queued, _ = await rescue.rescue_expired(db, limit=50)
        assert len(queued) == 50
        await rescue.rescue_expired(db, limit=50)
        assert [await stand(db, tenant) for tenant in tenants[:2]] == [(NOTHING, NOTHING)] * 2

    play(database_url, scenario)


@pytest.mark.parametrize("tenants", ["baba", "baab"])
def test_two_that_rescue_runs_of_the_same_tenants_do_not_wait_for_each_other_in_a_circle(
    database_url: str, tenants: str
) -> None:
    """Each sweep takes two of the four runs; which two, depends on whether it locks them all before the first ends."""

    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect() as db:
            for tenant in ("a", "b"):
                await give(db, "1", tenant)
            for tenant in tenants:
                await budgets.reserve(db, await claimed(db, tenant, lease_seconds=0), CENT)

        async def sweep() -> int:
            async with engine.connect() as db:
                return len((await rescue.rescue_expired(db, limit=2))[0])

        async with transactional(engine).begin() as holder:
            await holder.execute(text("SELECT FROM budgets WHERE tenant = 'b' FOR UPDATE"))
            one = asyncio.create_task(sweep())
            await asyncio.sleep(0.3)
            other = asyncio.create_task(sweep())
            await asyncio.sleep(0.3)
            assert not one.done()
        assert (await one, await other) == (2, 2)

    play_many(database_url, scenario)


# -- midnight


async def move(db: AsyncConnection, days: int) -> None:
    """Make it seem that so many days ago, or in so many days, somebody used the budget last."""
    await db.execute(text("UPDATE budgets SET day = day + CAST(:days AS int), spent_usd = 0.5"), {"days": days})


def test_at_midnight_the_budget_is_renewed_and_calls_under_way_still_count(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "0.51")
        held, other = await claimed(db), await claimed(db)
        await budgets.reserve(db, held, CENT)
        await move(db, -1)
        assert await stand(db) == (NOTHING, CENT)
        assert await budgets.reserve(db, other, 50 * CENT) is Reservation.MADE
        assert await stand(db) == (NOTHING, 51 * CENT)
        await move(db, -1)
        await reply(db, held, CENT)
        assert await stand(db) == (CENT, 50 * CENT)

    play(database_url, scenario)


def test_a_transaction_from_before_midnight_does_not_undo_the_renewal(database_url: str) -> None:
    """It began yesterday, by its clock, and comes to a budget that others have used today."""

    async def scenario(db: AsyncConnection) -> None:
        await give(db, "0.51")
        held = await claimed(db)
        await move(db, +1)
        assert await budgets.reserve(db, held, 2 * CENT) is Reservation.SPENT
        assert await budgets.reserve(db, held, CENT) is Reservation.MADE
        assert await stand(db) == (50 * CENT, CENT)
        await reply(db, held, CENT)
        assert await stand(db) == (51 * CENT, NOTHING)
        days = text("SELECT day - (now() AT TIME ZONE 'UTC')::date FROM budgets")
        assert (await db.execute(days)).scalar_one() == 1

    play(database_url, scenario)


def test_a_budget_says_when_it_is_renewed(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await give(db, "1")
        await db.execute(text("SET timezone = 'Pacific/Kiritimati'"))
        clock = text("SELECT extract(epoch FROM now())::float8 AS now")
        now = (await db.execute(clock)).scalar_one()
        assert abs((await budget_of(db)).renewed_in - (86_400 - now % 86_400)) < 5

    play(database_url, scenario)


# -- giving and taking


async def set_daily(engine: AsyncEngine, usd: str, tenant: str = "t") -> Budget:
    async with transactional(engine).begin() as db:
        return await budgets.set_daily(db, tenant, Decimal(usd))


def test_a_new_budget_counts_what_was_spent_and_is_reserved_already(database_url: str) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect() as db:
            ended, running, other = await claimed(db), await claimed(db), await claimed(db, "other")
            for one, costs in ((ended, (1, 2)), (running, (4,)), (other, (8,))):
                for seq, cents in enumerate(costs):
                    await reply(db, one, cents * CENT, seq=seq)
            await reply(db, running, None, seq=1)
            await TRANSITION["finish"](db, ended)
            budget = await set_daily(engine, "1")
            assert (budget.daily, budget.spent, budget.reserved) == (DOLLAR, 7 * CENT, NOTHING)
            await budgets.reserve(db, running, 20 * CENT)
            assert await budgets.remove(db, "t")
            assert not await budgets.remove(db, "t")
            again = await set_daily(engine, "1")
            assert (again.daily, again.spent, again.reserved) == (DOLLAR, 7 * CENT, 20 * CENT)
            await TRANSITION["requeue"](db, running)
            assert await stand(db) == (7 * CENT, NOTHING)

    play_many(database_url, scenario)


def test_a_new_budget_does_not_count_what_was_spent_before_today(database_url: str) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect() as db:
            old, resumed = await claimed(db), await claimed(db)
            for one in (old, resumed):
                await reply(db, one, CENT)
            await TRANSITION["finish"](db, old)
            yesterday = "(now() AT TIME ZONE 'UTC')::date::timestamp AT TIME ZONE 'UTC' - interval '1 s'"
            await db.execute(text(f"UPDATE steps SET recorded_at = {yesterday}"))
            await db.execute(text(f"UPDATE runs SET ended_at = {yesterday} WHERE ended_at IS NOT NULL"))
            await reply(db, resumed, 2 * CENT, seq=1)
        assert (await set_daily(engine, "1")).spent == 2 * CENT

    play_many(database_url, scenario)


def test_a_changed_budget_keeps_what_is_spent_and_reserved(database_url: str) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect() as db:
            await give(db, "1")
            held = await claimed(db)
            await budgets.reserve(db, held, CENT)
            await reply(db, held, CENT)
            await budgets.reserve(db, held, 2 * CENT)
            await db.execute(text("UPDATE budgets SET spent_usd = 0.5"))  # not what the steps say
        budget = await set_daily(engine, "0.25")
        assert (budget.daily, budget.spent, budget.reserved, budget.left) == (
            Decimal("0.25"),
            50 * CENT,
            2 * CENT,
            NOTHING,
        )
        async with engine.connect() as db:
            assert await budgets.reserve(db, held, CENT) is Reservation.SPENT
            assert [budget.tenant for budget in await budgets.list_all(db)] == ["t"]

    play_many(database_url, scenario)


def test_what_is_recorded_while_a_budget_is_made_counts_exactly_once(database_url: str) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect() as db:
            held = [await claimed(db) for _ in range(12)]
        is_over = asyncio.Event()

        async def keep_replying(one: Claim) -> int:
            seq = 0
            async with engine.connect() as db:
                while not is_over.is_set():
                    await reply(db, one, CENT, seq=seq)
                    seq += 1
            return seq

        replying = [asyncio.create_task(keep_replying(one)) for one in held]
        for _ in range(15):
            await asyncio.sleep(0.05)
            async with engine.connect() as db:
                await budgets.remove(db, "t")
            await asyncio.sleep(0.05)
            await set_daily(engine, "999")
        is_over.set()
        recorded = sum(await asyncio.gather(*replying))
        async with engine.connect() as db:
            assert await stand(db) == (recorded * CENT, NOTHING)

    play_many(database_url, scenario)
