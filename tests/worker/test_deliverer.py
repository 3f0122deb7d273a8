"""Delivering webhooks: what an endpoint receives, what its answers lead to, and whom a bad endpoint concerns."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy.ext.asyncio import AsyncEngine

import worker.delivery
from app.background import in_background
from app.db import deliveries, leases, webhooks
from app.db.deliveries import Claimed, Due
from app.db.engine import make_engine
from app.domain.run import StopReason
from app.domain.webhook import DeliveryError, Webhook, WebhookEvent
from app.webhook_signature import derive_secret, write_secret
from tests.db.test_transitions import claimed
from tests.webhook_receiver import Answer, Message, Receiver, a_receiver, verify
from worker.deliverer import OF_TENANT, TO_WEBHOOK, UNDER_WAY, Deliverer, fair_share
from worker.delivery import Courier, RetrySchedule
from worker.egress import Egress

KEY = "a key of the service's own, of 32 characters"
QUICK = RetrySchedule(waits=(0.1, 0.1, 0.1), jitter=0)
Row = dict[str, Any]


@dataclass
class Place:
    """A database, an endpoint, and what goes from one to the other."""

    engine: AsyncEngine
    database_url: str
    receiver: Receiver
    schedule: RetrySchedule = QUICK
    trusted: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def delivering(self, **more: Any) -> AsyncIterator["asyncio.Task[None]"]:
        """With a deliverer for the length of the block."""
        async with Egress(self.trusted) as egress:
            deliverer = Deliverer(self.engine, egress, KEY, **{"schedule": self.schedule, **more})
            async with in_background(deliverer.keep_delivering()) as task:
                yield task

    async def webhook(self, url: str | None = None, *, tenant: str = "t") -> Webhook:
        async with self.engine.connect() as db:
            webhook = await webhooks.create(
                db, tenant=tenant, url=url or self.receiver.url(), events=list(WebhookEvent), created_by="key:k"
            )
        assert webhook is not None
        return webhook

    async def end_a_run(self) -> UUID:
        async with self.engine.connect() as db:
            held = await claimed(db)
            await leases.finish(db, held, StopReason.FINAL_ANSWER, actor="w", output="done")
        return held.run.id

    def rows(self, statement: str, *parameters: object) -> list[Row]:
        with psycopg.connect(self.database_url, autocommit=True, row_factory=dict_row) as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def told(self) -> list[Row]:
        """The outbox, oldest first."""
        return self.rows("SELECT * FROM webhook_deliveries ORDER BY number")

    async def until(self, condition: Callable[[], object], *, seconds: float = 10) -> None:
        until = time.monotonic() + seconds
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < until, f"not within {seconds:g} s: {self.told()[:3]}"
            await asyncio.sleep(0.02)

    async def until_ended(self, *, seconds: float = 10) -> list[Row]:
        await self.until(lambda: all(row["status"] != "pending" for row in self.told()), seconds=seconds)
        return self.told()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with a_receiver() as receiver:
        yield receiver


Play = Callable[[Callable[[Place], Awaitable[None]]], None]


@pytest.fixture
def play(database_url: str, receiver: Receiver) -> Play:
    def play(scenario: Callable[[Place], Awaitable[None]]) -> None:
        async def run() -> None:
            engine = make_engine(database_url, pool_size=2, application_name="test")
            try:
                await scenario(Place(engine, database_url, receiver, trusted=[receiver.origin]))
            finally:
                await engine.dispose()

        asyncio.run(run())

    return play


# --- what an endpoint receives --------------------------------------------------------------------------------------


def test_a_message_arrives_within_about_a_second_and_is_genuine(play: Play) -> None:
    async def scenario(place: Place) -> None:
        webhook = await place.webhook()
        async with place.delivering():
            await asyncio.sleep(0.5)
            began = time.monotonic()
            run_id = await place.end_a_run()
            await place.until(lambda: place.receiver.messages)
            assert time.monotonic() - began < 2
            [told] = await place.until_ended()
        [message] = place.receiver.messages
        verify(write_secret(derive_secret(KEY, webhook.id)), message.headers, message.body)
        assert message.headers["content-type"] == "application/json"
        assert message.headers["user-agent"].startswith("agent-service/")
        assert message.content["type"] == "run.succeeded"
        assert message.run_id == str(run_id)
        assert (told["status"], told["attempts"], told["last_status"]) == ("delivered", 1, 200)
        assert message.id == str(told["id"])

    play(scenario)


def test_nothing_of_ours_is_sent_but_what_the_specification_asks_for(play: Play) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook(place.receiver.url("/hook?token=theirs"))
        await place.end_a_run()
        async with place.delivering():
            await place.until_ended()
        [message] = place.receiver.messages
        assert message.path == "/hook?token=theirs"
        ours = {"webhook-id", "webhook-timestamp", "webhook-signature", "content-type", "user-agent"}
        assert set(message.headers) - ours <= {"host", "accept", "accept-encoding", "content-length"}

    play(scenario)


def test_two_deliverers_share_the_work_and_send_nothing_twice(play: Play) -> None:
    async def scenario(place: Place) -> None:
        for _ in range(3):
            await place.webhook()
        for _ in range(20):
            await place.end_a_run()
        async with place.delivering(), place.delivering():
            await place.until_ended()
        ids = [message.id for message in place.receiver.messages]
        assert len(ids) == len(set(ids)) == 60

    play(scenario)


# --- what its answers lead to ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [201, 204, 299])
def test_any_2xx_is_a_delivery(play: Play, receiver: Receiver, status: int) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook()
        await place.end_a_run()
        async with place.delivering():
            [told] = await place.until_ended()
        assert (told["status"], told["last_status"], told["last_error"]) == ("delivered", status, None)

    receiver.answer_in_turn(Answer(status))
    play(scenario)


@pytest.mark.parametrize("status", [302, 400, 404, 429, 500, 503])
def test_any_other_status_is_tried_again_under_the_same_id(play: Play, receiver: Receiver, status: int) -> None:
    async def scenario(place: Place) -> None:
        webhook = await place.webhook()
        await place.end_a_run()
        async with place.delivering():
            [told] = await place.until_ended()
        first, second = place.receiver.messages
        assert first.id == second.id
        assert first.body == second.body
        secret = write_secret(derive_secret(KEY, webhook.id))
        for message in (first, second):
            verify(secret, message.headers, message.body)
        assert (told["status"], told["attempts"], told["last_error"]) == ("delivered", 2, None)

    receiver.answer_in_turn(Answer(status, {"Location": "/elsewhere"}), Answer())
    play(scenario)
    assert {message.path for message in receiver.messages} == {"/hook"}, "redirects are not followed"


def test_each_attempt_is_signed_with_its_own_time(play: Play, receiver: Receiver) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook()
        await place.end_a_run()
        place.schedule = RetrySchedule(waits=(1.1,), jitter=0)
        async with place.delivering():
            await place.until_ended()
        first, second = place.receiver.messages
        assert int(first.headers["webhook-timestamp"]) < int(second.headers["webhook-timestamp"])
        assert first.headers["webhook-signature"] != second.headers["webhook-signature"]

    receiver.answer_in_turn(Answer(500), Answer())
    play(scenario)


def test_when_the_schedule_is_over_it_has_failed(play: Play, receiver: Receiver) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook()
        await place.end_a_run()
        async with place.delivering():
            [told] = await place.until_ended()
        assert (told["status"], told["attempts"]) == ("failed", 4)
        assert (told["last_status"], told["last_error"]) == (500, "bad_status")
        assert len(place.receiver.messages) == 4

    receiver.answer_in_turn(Answer(500))
    play(scenario)


def test_an_endpoint_that_asks_for_time_gets_it(play: Play, receiver: Receiver) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook()
        await place.end_a_run()
        async with place.delivering():
            await place.until_ended()
        first, second = place.receiver.messages
        assert 1.9 < second.at - first.at < 4

    receiver.answer_in_turn(Answer(429, {"Retry-After": "2"}), Answer())
    play(scenario)


def test_a_webhook_whose_endpoint_is_gone_is_disabled(play: Play, receiver: Receiver) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook()
        for _ in range(2 * TO_WEBHOOK):
            await place.end_a_run()
        async with place.delivering():
            told = await place.until_ended()
        assert len(place.receiver.messages) <= TO_WEBHOOK
        assert {row["last_error"] for row in told} == {"gone", "webhook_disabled"}
        [webhook] = place.rows("SELECT * FROM webhooks")
        assert webhook["disabled_why"] == "the endpoint answered 410 Gone"

    receiver.answer_in_turn(Answer(410))
    play(scenario)


def test_an_endpoint_that_takes_too_long_has_not_received_it(
    play: Play, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook()
        await place.end_a_run()
        async with place.delivering():
            [told] = await place.until_ended()
        assert (told["status"], told["attempts"], told["last_status"]) == ("delivered", 2, 200)
        first, second = place.receiver.messages
        assert 0.3 < second.at - first.at < 2

    monkeypatch.setattr(worker.delivery, "TIMEOUT_SECONDS", 0.3)
    receiver.answer_in_turn(Answer(after=5), Answer())
    play(scenario)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("http://127.0.0.1:1/hook", DeliveryError.REFUSED),
        ("https://127.0.0.1/hook", DeliveryError.REFUSED),
        ("https://[::1]/hook", DeliveryError.REFUSED),
        ("https://169.254.169.254/latest/meta-data", DeliveryError.REFUSED),
        ("https://localhost/hook", DeliveryError.REFUSED),
        ("https://user:password@example.com/hook", DeliveryError.REFUSED),
        ("https://no-such-name.invalid/hook", DeliveryError.NO_ANSWER),
    ],
)
def test_where_nothing_may_be_sent_nothing_is(play: Play, url: str, error: DeliveryError) -> None:
    """Whatever got into the table: names are looked at when something is sent."""

    async def scenario(place: Place) -> None:
        place.trusted = []
        await place.webhook(url)
        await place.webhook()  # the receiver, which nobody trusts here
        await place.end_a_run()
        place.schedule = RetrySchedule(waits=())
        async with place.delivering():
            first, second = await place.until_ended()
        assert (first["status"], first["last_error"], first["last_status"]) == ("failed", error, None)
        assert second["last_error"] == "refused"
        assert place.receiver.messages == []

    play(scenario)


def test_no_token_in_an_address_reaches_the_log_or_the_database_again(
    play: Play, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def scenario(place: Place) -> None:
        for url in (receiver.url("/hook?canary=1"), "http://127.0.0.1:1/canary", "https://canary@[/", "canary"):
            await place.webhook(url)
        await place.end_a_run()
        async with place.delivering():
            told = await place.until_ended()
        assert {row["status"] for row in told} == {"failed"}
        assert all("canary" not in f"{row['last_error']}{row['body']}" for row in told)

    receiver.answer_in_turn(Answer(500))
    play(scenario)
    ours = [record for record in caplog.records if record.name.partition(".")[0] in ("app", "worker")]
    assert all("canary" not in f"{record.getMessage()}{record.__dict__}" for record in ours)


class _Broken:
    async def post(self, url: str, *args: object, **more: object) -> Any:
        raise RuntimeError(f"a bug at {url}")


def test_a_bug_in_sending_is_the_failure_of_one_message(caplog: pytest.LogCaptureFixture) -> None:
    sent = Claimed(id=uuid4(), tenant="t", webhook_id=uuid4(), url="canary", body="{}", attempt=1, sent_at=1)
    courier = Courier(sender=_Broken(), signing_key=KEY, schedule=QUICK, random=Random(1))
    outcome = asyncio.run(courier.attempt(sent))
    assert (outcome.error, outcome.status, outcome.retry_s) == (DeliveryError.INTERNAL, None, 0.1)
    [record] = caplog.records
    assert record.getMessage() == "webhook delivery crashed"
    assert "canary" not in f"{caplog.text}{record.__dict__}"


# --- whom a bad endpoint concerns -----------------------------------------------------------------------------------


def test_an_endpoint_that_hangs_holds_up_no_other(play: Play, receiver: Receiver) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook(receiver.url("/hangs"))
        await place.webhook(receiver.url("/works"))
        for _ in range(20):
            await place.end_a_run()
        began = time.monotonic()
        async with place.delivering():
            works = "SELECT count(*) AS n FROM webhook_deliveries WHERE status = 'delivered'"
            await place.until(lambda: place.rows(works) == [{"n": 20}])
        assert time.monotonic() - began < 3
        assert receiver.most_at_once["/hangs"] == TO_WEBHOOK

    receiver.answers = lambda message: Answer(after=20 if message.path == "/hangs" else 0)
    play(scenario)


def test_an_endpoint_that_fails_is_sent_one_message_at_a_time(play: Play, receiver: Receiver) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook()
        place.rows("UPDATE webhooks SET failing_since = now()")
        for _ in range(6):
            await place.end_a_run()
        async with place.delivering():
            await place.until_ended()
        assert receiver.most_at_once["/hook"] == 1

    receiver.answers = lambda message: Answer(500, after=0.05)
    play(scenario)


def due(webhook: UUID, tenant: str, *, is_failing: bool = False) -> Due:
    return Due(webhook, tenant, is_failing=is_failing, is_closed=False)


def under_way(tenant: str, webhook: UUID, count: int) -> list[Claimed]:
    return [
        Claimed(id=uuid4(), tenant=tenant, webhook_id=webhook, url="", body="", attempt=1, sent_at=0)
        for _ in range(count)
    ]


def test_one_webhook_gets_its_part_and_no_more() -> None:
    webhook = uuid4()
    assert fair_share([due(webhook, "t")], []) == {webhook: TO_WEBHOOK}
    assert fair_share([due(webhook, "t")], under_way("t", webhook, TO_WEBHOOK - 2)) == {webhook: 2}
    assert fair_share([due(webhook, "t")], under_way("t", webhook, TO_WEBHOOK)) == {}
    assert fair_share([due(webhook, "t", is_failing=True)], []) == {webhook: 1}
    assert fair_share([due(webhook, "t", is_failing=True)], under_way("t", webhook, 1)) == {}


def test_a_tenant_with_many_webhooks_gets_no_more_than_its_part() -> None:
    own = [uuid4() for _ in range(OF_TENANT - 1)]
    share = fair_share([due(webhook, "t") for webhook in own], [])
    assert sum(share.values()) == OF_TENANT
    assert set(share) == set(own), "each gets one before any gets two"
    assert fair_share([due(uuid4(), "t")], under_way("t", uuid4(), OF_TENANT)) == {}


def test_who_has_least_under_way_comes_first_when_there_is_little_room() -> None:
    quiet = uuid4()
    busy = [one for tenant in range(UNDER_WAY - 1) for one in under_way(f"busy {tenant}", uuid4(), 1)]
    share = fair_share([*(due(one.webhook_id, one.tenant) for one in busy), due(quiet, "quiet")], busy)
    assert share == {quiet: 1}
    assert fair_share([due(quiet, "quiet")], [*busy, *under_way("busy", uuid4(), 1)]) == {}


# --- when things break ----------------------------------------------------------------------------------------------


def test_what_was_under_way_when_a_worker_ended_is_sent_by_another(play: Play, receiver: Receiver) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook()
        await place.end_a_run()
        async with Egress(place.trusted) as egress:
            deliverer = Deliverer(place.engine, egress, KEY, schedule=QUICK, claim_seconds=0.5)
            async with in_background(deliverer.keep_delivering()):
                await place.until(lambda: receiver.messages)
            await asyncio.sleep(0.1)
            assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing goes on in the background"
        async with place.delivering():
            [told] = await place.until_ended()
        first, second = receiver.messages
        assert first.id == second.id
        assert second.at - first.at > 0.4, "not before its claim was over"
        assert (told["status"], told["attempts"]) == ("delivered", 2)

    receiver.answer_in_turn(Answer(after=5), Answer())
    play(scenario)


def test_a_stopped_deliverer_begins_nothing_and_writes_down_what_is_under_way(play: Play, receiver: Receiver) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook()
        await place.end_a_run()
        async with Egress(place.trusted) as egress:
            deliverer = Deliverer(place.engine, egress, KEY, schedule=QUICK)
            async with in_background(deliverer.keep_delivering()):
                await place.until(lambda: receiver.messages)
                deliverer.stop()
                await place.end_a_run()
                await place.until(lambda: place.told()[0]["status"] == "delivered")
                await asyncio.sleep(1.5)
        assert len(receiver.messages) == 1
        assert place.told()[1]["attempts"] == 0

    receiver.answers = lambda message: Answer(after=0.5)
    play(scenario)


def test_while_postgres_is_away_nothing_is_lost_and_nothing_sent_twice(
    play: Play, receiver: Receiver, owner_url: str
) -> None:
    """Away, for the outbox: its table has another name for a while."""

    def rename(old: str, new: str) -> None:
        with psycopg.connect(owner_url, autocommit=True) as owner:
            owner.execute(f"ALTER TABLE {old} RENAME TO {new}")

    def answer(message: Message) -> Answer:
        if len(receiver.messages) == 1:
            rename("webhook_deliveries", "elsewhere")
        return Answer()

    async def scenario(place: Place) -> None:
        await place.webhook()
        first = await place.end_a_run()
        async with place.delivering():
            await place.until(lambda: receiver.messages)
            await asyncio.sleep(2)
            await asyncio.to_thread(rename, "elsewhere", "webhook_deliveries")
            second = await place.end_a_run()
            await place.until_ended()
        assert [message.run_id for message in receiver.messages] == [str(first), str(second)]

    receiver.answers = answer
    play(scenario)


def test_connections_that_break_are_replaced(play: Play, receiver: Receiver) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook()
        breaking = make_engine(place.database_url, pool_size=1, application_name="breaking")
        async with replace(place, engine=breaking).delivering() as task:
            for _ in range(5):
                await place.end_a_run()
                await asyncio.to_thread(
                    place.rows,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'breaking' AND datname = current_database()",
                )
            await place.until_ended()
            assert not task.done()
        await breaking.dispose()
        assert len({message.run_id for message in receiver.messages}) == 5

    play(scenario)


def test_messages_to_a_deleted_webhook_are_not_sent(play: Play, receiver: Receiver) -> None:
    async def scenario(place: Place) -> None:
        webhook = await place.webhook()
        await place.end_a_run()
        place.schedule = RetrySchedule(waits=(3_600.0,))
        async with place.delivering():
            await place.until(lambda: place.told()[0]["last_status"] == 500)
            async with place.engine.connect() as db:
                await webhooks.delete(db, webhook.id, "t")
            [told] = await place.until_ended()
        assert told["last_error"] == "webhook_deleted"
        assert len(receiver.messages) == 1

    receiver.answer_in_turn(Answer(500))
    play(scenario)


def test_what_is_asked_for_again_is_sent_again(play: Play, receiver: Receiver) -> None:
    async def scenario(place: Place) -> None:
        webhook = await place.webhook()
        await place.end_a_run()
        async with place.delivering():
            [told] = await place.until_ended()
            async with place.engine.connect() as db:
                assert await deliveries.redeliver(db, told["id"], webhook.id, "t")
            await place.until(lambda: len(receiver.messages) == 2)
            await place.until_ended()
        first, second = receiver.messages
        assert first.id == second.id

    play(scenario)


def test_what_ended_a_month_ago_is_forgotten(play: Play) -> None:
    async def scenario(place: Place) -> None:
        await place.webhook()
        await place.end_a_run()
        await place.end_a_run()
        place.rows("""
            UPDATE webhook_deliveries SET status = 'failed', ended_at = now() - interval '30 days 1 minute'
            WHERE number = (SELECT min(number) FROM webhook_deliveries)
        """)
        async with place.delivering():
            await place.until(lambda: [row["status"] for row in place.told()] == ["delivered"])

    play(scenario)
