"""The outbox: filled by whatever moves a run, claimed by one deliverer at a time, settled once."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import deliveries, leases, rescue, runs, webhooks
from app.db.deliveries import Claimed, Outcome
from app.db.engine import make_engine, transactional
from app.domain.errors import LeaseLost
from app.domain.run import RunStatus, StopReason
from app.domain.webhook import MAX_WEBHOOKS, Delivery, DeliveryError, DeliveryStatus, Webhook, WebhookEvent
from tests.db.test_sweep import end_overdue, ran_for
from tests.db.test_transitions import QUESTION, RULES, TRANSITION, claim, claimed, in_state, play, status_of

DAY = 86_400.0
PENDING, DELIVERED, FAILED = DeliveryStatus
TOLD = (RunStatus.WAITING, RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED)


async def a_webhook(
    db: AsyncConnection, *, tenant: str = "t", events: Sequence[WebhookEvent] = tuple(WebhookEvent)
) -> Webhook:
    webhook = await webhooks.create(db, tenant=tenant, url="https://x.example", events=events, created_by="key:k")
    assert webhook is not None
    return webhook


async def end_a_run(db: AsyncConnection, reason: StopReason = StopReason.FINAL_ANSWER) -> UUID:
    held = await claimed(db)
    await leases.finish(db, held, reason, actor="w", output="secret words")
    return held.run.id


async def of_run(db: AsyncConnection, run_id: UUID) -> list[Delivery]:
    """Oldest first."""
    return list(await deliveries.of_run(db, run_id, "t", before=None, limit=100))[::-1]


async def take(db: AsyncConnection, *webhook_ids: UUID, most: int = 100, seconds: float = 20) -> list[Claimed]:
    return list(await deliveries.claim(db, dict.fromkeys(webhook_ids, most), lease_seconds=seconds))


async def settle(db: AsyncConnection, *outcomes: Outcome) -> Sequence[UUID]:
    return await deliveries.settle(db, outcomes, patience_s=5 * DAY)


def success(sent: Claimed) -> Outcome:
    return Outcome(id=sent.id, attempt=sent.attempt, status=204, error=None)


def failure(sent: Claimed, retry_s: float | None = 60) -> Outcome:
    return Outcome(id=sent.id, attempt=sent.attempt, status=500, error=DeliveryError.BAD_STATUS, retry_s=retry_s)


async def let_pass(db: AsyncConnection, seconds: float) -> None:
    """Make everything that is written down older."""
    for table, columns in (
        ("webhook_deliveries", ("next_attempt_at", "ended_at", "created_at")),
        ("webhooks", ("failing_since",)),
    ):
        changes = ", ".join(f"{column} = {column} - make_interval(secs => :seconds)" for column in columns)
        await db.execute(text(f"UPDATE {table} SET {changes}"), {"seconds": seconds})


# --- what fills it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSITION)
def test_a_transition_tells_of_the_state_that_it_leads_to(database_url: str, name: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        for before in RunStatus:
            held = await in_state(db, before)
            webhook = await a_webhook(db)
            with suppress(LeaseLost):
                await TRANSITION[name](db, held)
            after = await status_of(db, held)
            told = [(one.event, one.status, one.attempts) for one in await of_run(db, held.run.id)]
            is_told = after is not before and after in TOLD
            assert told == ([(WebhookEvent(f"run.{after}"), PENDING, 0)] if is_told else [])
            await webhooks.delete(db, webhook.id, "t")

    play(database_url, scenario)


def test_what_the_sweeper_ends_is_told_too(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await a_webhook(db)
        again, dead, late = await claimed(db, lease_seconds=0), await claimed(db, max_attempts=1), await claimed(db)
        await db.execute(text("UPDATE runs SET lease_until = now() WHERE id = :id"), {"id": dead.run.id})
        await ran_for(db, late, late.run.limits.deadline_s + 100)
        assert await end_overdue(db) == [late.run.id]
        await rescue.rescue_expired(db, limit=10)
        assert await of_run(db, again.run.id) == []
        for held, reason in ((dead, StopReason.MAX_ATTEMPTS), (late, StopReason.DEADLINE)):
            [told] = await of_run(db, held.run.id)
            assert told.event is WebhookEvent.FAILED
            body = await db.execute(text("SELECT body FROM webhook_deliveries WHERE id = :id"), {"id": told.id})
            assert json.loads(body.scalar_one())["data"]["stop_reason"] == reason

    play(database_url, scenario)


def test_a_run_that_waits_twice_is_told_of_twice(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        await a_webhook(db)
        held = await in_state(db, RunStatus.WAITING)
        await TRANSITION["resume"](db, held)
        again = await claim(db, held.run.id)
        await leases.suspend(db, again, [QUESTION], actor="w", rules=RULES)
        assert [told.event for told in await of_run(db, held.run.id)] == [WebhookEvent.WAITING] * 2

    play(database_url, scenario)


def test_what_is_told_is_which_run_and_how_it_stands_and_nothing_that_anybody_wrote(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        run_id = await end_a_run(db)
        [sent] = await take(db, webhook.id)
        content = json.loads(sent.body)
        at = datetime.fromisoformat(content.pop("timestamp"))
        assert abs(datetime.now(UTC) - at) < timedelta(seconds=5)
        assert content == {
            "type": "run.succeeded",
            "data": {"run_id": str(run_id), "agent": "a", "status": "succeeded", "stop_reason": "final_answer"},
        }

    play(database_url, scenario)


def test_a_transition_that_is_taken_back_is_told_to_nobody(database_url: str) -> None:
    async def run() -> None:
        engine = make_engine(database_url, pool_size=2, application_name="test")
        async with engine.connect() as db:
            await a_webhook(db)
            held = await claimed(db)
            async with transactional(engine).connect() as other:
                await leases.finish(other, held, StopReason.FINAL_ANSWER, actor="w")
                assert len(await of_run(other, held.run.id)) == 1
            assert await of_run(db, held.run.id) == []
        await engine.dispose()

    asyncio.run(run())


def test_a_webhook_is_told_what_it_asked_for_of_its_own_tenant_while_it_is_enabled(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        failures = await a_webhook(db, events=[WebhookEvent.FAILED])
        everything = await a_webhook(db)
        await a_webhook(db, tenant="other")
        disabled = await a_webhook(db)
        await db.execute(text("UPDATE webhooks SET disabled_at = now() WHERE id = :id"), {"id": disabled.id})
        good, bad = await end_a_run(db), await end_a_run(db, StopReason.MAX_STEPS)
        assert {told.webhook_id for told in await of_run(db, good)} == {everything.id}
        assert {told.webhook_id for told in await of_run(db, bad)} == {everything.id, failures.id}
        await runs.cancel(db, (await claimed(db)).run.id, "t", actor="k")
        rows = await db.execute(text("SELECT count(*) FROM webhook_deliveries"))
        assert rows.scalar_one() == 4

    play(database_url, scenario)


# --- what becomes of it ---------------------------------------------------------------------------------------------


def test_a_delivery_is_claimed_once_until_its_claim_is_over(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        run_id = await end_a_run(db)
        [first] = await take(db, webhook.id)
        assert (first.attempt, first.url, first.tenant) == (1, "https://x.example", "t")
        assert abs(first.sent_at - datetime.now(UTC).timestamp()) < 5
        assert await take(db, webhook.id) == []
        assert await deliveries.due(db) == []
        await let_pass(db, 21)
        [again] = await take(db, webhook.id)
        assert (again.id, again.body, again.attempt) == (first.id, first.body, 2)
        [told] = await of_run(db, run_id)
        assert (told.status, told.attempts) == (PENDING, 2)

    play(database_url, scenario)


def test_many_who_claim_at_once_get_each_delivery_once(database_url: str) -> None:
    async def run() -> None:
        engine = make_engine(database_url, pool_size=8, application_name="test")
        async with engine.connect() as db:
            webhook = await a_webhook(db)
            for _ in range(40):
                await end_a_run(db)

        async def claim_some() -> list[Claimed]:
            async with engine.connect() as connection:
                return await take(connection, webhook.id, most=4)

        rounds = await asyncio.gather(*(claim_some() for _ in range(8)))
        got = [sent.id for sent in chain.from_iterable(rounds)]
        assert len(got) == len(set(got))
        assert len(got) >= 30, "they do not stand in each other's way"
        await engine.dispose()

    asyncio.run(run())


def test_nobody_waits_for_what_somebody_else_is_about_to_claim(database_url: str) -> None:
    async def run() -> None:
        engine = make_engine(database_url, pool_size=2, application_name="test")
        async with engine.connect() as db:
            webhook = await a_webhook(db)
            for _ in range(3):
                await end_a_run(db)
            async with transactional(engine).connect() as frozen:
                [held] = await take(frozen, webhook.id, most=1)
                async with asyncio.timeout(5):
                    others = await take(db, webhook.id)
                assert len(others) == 2
            assert [sent.id for sent in await take(db, webhook.id)] == [held.id]
        await engine.dispose()

    asyncio.run(run())


def test_the_longest_due_are_claimed_first_and_no_more_than_asked_for(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        one, other = await a_webhook(db), await a_webhook(db)
        order = [await end_a_run(db) for _ in range(5)]
        claimed_now = await deliveries.claim(db, {one.id: 3, other.id: 1}, lease_seconds=20)
        runs_of_one = {json.loads(sent.body)["data"]["run_id"] for sent in claimed_now if sent.webhook_id == one.id}
        assert runs_of_one == {str(run_id) for run_id in order[:3]}
        assert len(claimed_now) == 4

    play(database_url, scenario)


def test_a_failure_is_tried_again_when_its_time_has_come(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        run_id = await end_a_run(db)
        [sent] = await take(db, webhook.id)
        await settle(db, failure(sent, 60))
        [told] = await of_run(db, run_id)
        assert (told.status, told.last_status, told.last_error) == (PENDING, 500, DeliveryError.BAD_STATUS)
        assert told.next_attempt_at is not None
        assert 55 < (told.next_attempt_at - datetime.now(UTC)).total_seconds() < 61
        await let_pass(db, 58)
        assert await deliveries.due(db) == []
        await let_pass(db, 3)
        assert [one.webhook_id for one in await deliveries.due(db)] == [webhook.id]
        [again] = await take(db, webhook.id)
        await settle(db, success(again))
        [told] = await of_run(db, run_id)
        assert (told.status, told.attempts, told.last_status, told.last_error) == (DELIVERED, 2, 204, None)
        assert told.next_attempt_at is None
        assert told.ended_at is not None
        await let_pass(db, DAY)
        assert await deliveries.due(db) == []

    play(database_url, scenario)


def test_the_last_failure_is_the_end(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        run_id = await end_a_run(db)
        [sent] = await take(db, webhook.id)
        assert await settle(db, failure(sent, None)) == []
        [told] = await of_run(db, run_id)
        assert (told.status, told.last_error) == (FAILED, DeliveryError.BAD_STATUS)
        assert told.ended_at is not None

    play(database_url, scenario)


def test_a_late_failure_changes_nothing_and_a_late_success_counts(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        run_id = await end_a_run(db)
        [slow] = await take(db, webhook.id, seconds=0)
        [second] = await take(db, webhook.id)
        await settle(db, failure(slow, None))
        [told] = await of_run(db, run_id)
        assert told.status is PENDING
        await settle(db, success(slow))
        await settle(db, failure(second))
        [told] = await of_run(db, run_id)
        assert told.status is DELIVERED

    play(database_url, scenario)


def test_several_outcomes_at_once_are_each_its_own(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        one, other = await a_webhook(db), await a_webhook(db)
        first, second = await end_a_run(db), await end_a_run(db)
        sent = await take(db, one.id, other.id)
        await settle(db, *(success(each) if each.webhook_id == one.id else failure(each) for each in sent))
        for run_id in (first, second):
            outcome = {told.webhook_id: told.status for told in await of_run(db, run_id)}
            assert outcome == {one.id: DELIVERED, other.id: PENDING}

    play(database_url, scenario)


# --- when a webhook is no good --------------------------------------------------------------------------------------


async def state_of(db: AsyncConnection, webhook: Webhook) -> Webhook:
    found = await webhooks.get(db, webhook.id, "t")
    assert found is not None
    return found


def test_a_webhook_fails_from_its_first_failure_until_the_next_success(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        for _ in range(3):
            await end_a_run(db)
        one, two, three = await take(db, webhook.id)
        assert (await state_of(db, webhook)).failing_since is None
        await settle(db, failure(one))
        since = (await state_of(db, webhook)).failing_since
        assert since is not None
        await settle(db, failure(two))
        assert (await state_of(db, webhook)).failing_since == since
        await let_pass(db, 100)
        assert [due.is_failing for due in await deliveries.due(db)] == [True]
        await settle(db, success(three))
        assert (await state_of(db, webhook)).failing_since is None
        assert [due.is_failing for due in await deliveries.due(db)] == [False]

    play(database_url, scenario)


def test_an_endpoint_that_is_gone_is_told_nothing_more(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook, other = await a_webhook(db), await a_webhook(db)
        first, second = await end_a_run(db), await end_a_run(db)
        [sent] = await take(db, webhook.id, most=1)
        assert await settle(db, replace(failure(sent, None), status=410, error=DeliveryError.GONE)) == [webhook.id]
        disabled = await state_of(db, webhook)
        assert disabled.disabled_at is not None
        assert disabled.disabled_why == "the endpoint answered 410 Gone"
        assert await take(db, webhook.id) == []
        closed = [due.webhook_id for due in await deliveries.due(db) if due.is_closed]
        assert closed == [webhook.id]
        assert await deliveries.close(db, closed, limit=10) == 1
        errors = {told.last_error for run in (first, second) for told in await of_run(db, run)}
        assert errors == {DeliveryError.GONE, DeliveryError.WEBHOOK_DISABLED, None}
        assert len(await take(db, other.id)) == 2
        third = await end_a_run(db)
        assert [told.webhook_id for told in await of_run(db, third)] == [other.id]

    play(database_url, scenario)


@pytest.mark.parametrize(("days", "gives_up", "is_disabled"), [(4, True, False), (6, False, False), (6, True, True)])
def test_a_webhook_that_failed_for_days_is_disabled_when_it_gives_up_one_more_message(
    database_url: str, days: float, gives_up: bool, is_disabled: bool
) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        await end_a_run(db)
        [sent] = await take(db, webhook.id)
        await settle(db, failure(sent))
        await let_pass(db, days * DAY)
        [again] = await take(db, webhook.id)
        disabled = await settle(db, failure(again, None if gives_up else 60))
        assert list(disabled) == ([webhook.id] if is_disabled else [])
        found = await state_of(db, webhook)
        assert (found.disabled_why == "every delivery has failed for days") is is_disabled
        assert (found.disabled_at is not None) is is_disabled

    play(database_url, scenario)


def test_giving_up_a_message_does_not_make_a_webhook_look_better(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        for _ in range(2):
            await end_a_run(db)
        one, two = await take(db, webhook.id)
        await settle(db, failure(one), failure(two))
        await let_pass(db, 4 * DAY)
        one, two = await take(db, webhook.id)
        assert await settle(db, failure(one, None)) == []
        await let_pass(db, 2 * DAY)
        assert await settle(db, failure(two, None)) == [webhook.id]

    play(database_url, scenario)


def test_what_is_pending_for_a_webhook_that_was_deleted_is_not_sent(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        run_ids = [await end_a_run(db) for _ in range(3)]
        [sent] = await take(db, webhook.id, most=1)
        await settle(db, failure(sent, 7_200))
        assert not await webhooks.delete(db, webhook.id, "other")
        assert await webhooks.delete(db, webhook.id, "t")
        assert await take(db, webhook.id) == []
        [due] = await deliveries.due(db)
        assert due.is_closed
        await let_pass(db, 100)
        assert await deliveries.close(db, [webhook.id], limit=2) == 2
        assert await deliveries.close(db, [webhook.id], limit=2) == 1
        for run_id in run_ids:
            [told] = await of_run(db, run_id)
            assert (told.status, told.last_error) == (FAILED, DeliveryError.WEBHOOK_DELETED)
        assert await deliveries.due(db) == []

    play(database_url, scenario)


# --- what its tenant sees -------------------------------------------------------------------------------------------


def test_what_is_sent_again_starts_anew_under_its_old_id(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        run_id = await end_a_run(db)
        [sent] = await take(db, webhook.id)
        await settle(db, failure(sent, None))
        for webhook_id, tenant in ((webhook.id, "other"), (uuid4(), "t")):
            assert await deliveries.redeliver(db, sent.id, webhook_id, tenant) is None
        again = await deliveries.redeliver(db, sent.id, webhook.id, "t")
        assert again is not None
        assert (again.id, again.status, again.attempts, again.ended_at) == (sent.id, PENDING, 0, None)
        [resent] = await take(db, webhook.id)
        assert (resent.id, resent.body, resent.attempt) == (sent.id, sent.body, 1)
        await settle(db, success(resent))
        [told] = await of_run(db, run_id)
        assert told.status is DELIVERED

    play(database_url, scenario)


def test_lists_have_the_newest_first_and_go_on_where_they_stopped(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook, other = await a_webhook(db), await a_webhook(db)
        run_ids = [await end_a_run(db) for _ in range(5)]
        seen: list[Delivery] = []
        while page := await deliveries.of_webhook(db, webhook.id, "t", before=seen[-1].id if seen else None, limit=2):
            seen += page
        assert [told.run_id for told in seen] == run_ids[::-1]
        assert await deliveries.of_webhook(db, webhook.id, "other", before=None, limit=10) == []
        assert await deliveries.of_run(db, run_ids[0], "other", before=None, limit=10) == []
        one, two = await of_run(db, run_ids[0])
        assert {one.webhook_id, two.webhook_id} == {webhook.id, other.id}
        assert await deliveries.of_run(db, run_ids[0], "t", before=two.id, limit=10) == [one]
        assert await deliveries.of_run(db, run_ids[0], "t", before=uuid4(), limit=10) == []
        newest_first = await webhooks.list_newest(db, "t", before=None, limit=10)
        assert [found.id for found in newest_first] == [other.id, webhook.id]
        assert await webhooks.list_newest(db, "t", before=other.id, limit=10) == [webhook]

    play(database_url, scenario)


def test_what_ended_long_ago_is_forgotten_the_oldest_first(database_url: str) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        run_ids = [await end_a_run(db) for _ in range(5)]
        for sent in await take(db, webhook.id, most=4):
            await settle(db, success(sent))
        await let_pass(db, 29 * DAY)
        assert await deliveries.forget(db, older_than_s=30 * DAY, limit=10) == 0
        await let_pass(db, 2 * DAY)
        assert await deliveries.forget(db, older_than_s=30 * DAY, limit=3) == 3
        assert await deliveries.forget(db, older_than_s=30 * DAY, limit=3) == 1
        left = [told.run_id for run_id in run_ids for told in await of_run(db, run_id)]
        assert left == run_ids[4:], "what is pending is kept"

    play(database_url, scenario)


def test_a_tenant_has_no_more_webhooks_than_it_may_however_many_it_asks_for_at_once(database_url: str) -> None:
    async def run() -> None:
        engine = make_engine(database_url, pool_size=10, application_name="test", pool_timeout_s=30)

        async def create(tenant: str) -> Webhook | None:
            async with transactional(engine).begin() as connection:
                return await webhooks.create(
                    connection, tenant=tenant, url="https://x.example", events=list(WebhookEvent), created_by="key:k"
                )

        made = await asyncio.gather(*(create(tenant) for tenant in ("t", "other") for _ in range(25)))
        assert sum(webhook is not None for webhook in made) == 2 * MAX_WEBHOOKS
        async with engine.connect() as db:
            for tenant in ("t", "other"):
                found = await webhooks.list_newest(db, tenant, before=None, limit=100)
                assert len(found) == MAX_WEBHOOKS
            await webhooks.delete(db, found[0].id, "other")
        assert await create("other") is not None
        assert await create("other") is None
        await engine.dispose()

    asyncio.run(run())


# --- what it costs --------------------------------------------------------------------------------------------------


def test_finding_what_is_due_takes_no_longer_however_much_has_ended_or_is_still_to_come(
    database_url: str, owner_url: str
) -> None:
    async def scenario(db: AsyncConnection) -> None:
        webhook = await a_webhook(db)
        many = text("""
            INSERT INTO webhook_deliveries (tenant, webhook_id, run_id, event, body, status, next_attempt_at, ended_at)
            SELECT 't', :id, gen_random_uuid(), 'run.failed', '{}',
                   CASE WHEN n % 20 = 0 THEN 'pending' ELSE 'delivered' END, now() + interval '1 hour',
                   CASE WHEN n % 20 <> 0 THEN now() END
            FROM generate_series(1, 40000) AS n
        """)
        await db.execute(many, {"id": webhook.id})
        await db.execute(text("ANALYZE webhook_deliveries"))
        run_id = await end_a_run(db)
        explained = await db.execute(text(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {deliveries._DUE.text}"))
        [plan] = explained.scalar_one()
        assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < 50, plan
        [sent] = await take(db, webhook.id)
        assert str(run_id) in sent.body

    play(owner_url, scenario)
