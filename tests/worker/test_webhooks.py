"""Webhooks from end to end: workers as processes, which run, drain and die beside an endpoint that may be bad."""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
import redis
from psycopg.rows import dict_row

from app.devstack.access import make_key
from app.devstack.processes import Process, Reaper
from app.devstack.stack import Api, Worker
from tests.api.conftest import client_of
from tests.scripts import DONE, Run, Script, call, rest, submit
from tests.stack import TEMPLATE, Stack, clean_env
from tests.webhook_receiver import Answer, Message, Receiver, a_receiver, verify

KEY = "a key of the service's own, of 32 characters"
TENANT = "told"
Json = dict[str, Any]


@dataclass
class Service:
    """An API, workers, and an endpoint of somebody's."""

    stack: Stack
    database_url: str
    client: httpx.Client
    receiver: Receiver
    new_worker: Callable[..., Worker]

    def webhook(self, path: str = "/hook") -> Json:
        response = self.client.post("/v1/webhooks", json={"url": self.receiver.url(path)})
        assert response.status_code == 201, response.text
        webhook: Json = response.json()
        return webhook

    def run(self) -> Run:
        """A run that has ended."""
        run = rest(self.client, submit(self.client, "toolbox", Script(self.stack.model_url, [DONE]).input))
        assert run["status"] == "succeeded"
        return run

    def deliveries(self, webhook: Json) -> list[Json]:
        found: list[Json] = self.client.get(f"/v1/webhooks/{webhook['id']}/deliveries").json()["data"]
        return found

    def until_delivered(self, webhook: Json, count: int) -> None:
        self.stack.until(
            lambda: [one["status"] for one in self.deliveries(webhook)].count("delivered") == count, seconds=20
        )

    def claims_are_over(self) -> None:
        """As if half a minute had passed."""
        with psycopg.connect(self.database_url, autocommit=True, row_factory=dict_row) as connection:
            connection.execute("UPDATE webhook_deliveries SET next_attempt_at = next_attempt_at - interval '30 s'")


@pytest.fixture
def service(servers: Stack, reaper: Reaper) -> Iterator[Service]:
    name = f"test_{uuid4().hex}"
    servers.postgres.create_database(name, template=TEMPLATE)
    with ExitStack() as ends:
        ends.callback(servers.postgres.drop_database, name)
        receiver = ends.enter_context(a_receiver())
        with redis.Redis.from_url(servers.valkey.url(3)) as connection:
            connection.flushdb()
        database_url = servers.postgres.service_url(name)
        env = {
            **servers.env,
            **clean_env(DATABASE_URL=database_url, REDIS_URL=servers.valkey.url(3), AGENTS="app.agents,tests.agents"),
            "WEBHOOK_SIGNING_KEY": KEY,
            "EGRESS_TRUSTED_ORIGINS": receiver.origin,
            "DRAIN_SECONDS": "4",
        }

        def started(process: Process, own_env: dict[str, str]) -> None:
            process.env = env | own_env
            ends.callback(process.stop)
            process.start()

        def new_worker(**more: str) -> Worker:
            worker = Worker("own-worker", log=servers.directory / f"worker-{uuid4().hex}.log", reaper=reaper)
            started(worker, worker.own_env | more)
            return worker

        api = Api("own-api", log=servers.directory / f"api-{uuid4().hex}.log", reaper=reaper)
        started(api, api.own_env)
        key = make_key(database_url, tenant=TENANT, name="test")
        client = ends.enter_context(client_of(api, key))
        yield Service(servers, database_url, client, receiver, new_worker)


def hangs(message: Message) -> Answer:
    return Answer(after=30 if message.path == "/hangs" else 0)


def test_a_webhook_is_told_when_a_run_waits_and_when_it_ends(service: Service) -> None:
    service.new_worker()
    webhook = service.webhook()
    script = Script(service.stack.model_url, [call("open_the_door"), DONE])
    run = rest(service.client, submit(service.client, "toolbox", script.input))
    assert run["status"] == "waiting"
    [review] = service.client.get("/v1/reviews").json()["data"]
    decision = {"decision": "reject", "args_hash": review["args_hash"]}
    assert service.client.post(f"/v1/reviews/{review['id']}/decision", json=decision).status_code == 200
    ended = rest(service.client, run)
    messages = service.receiver.until(2)
    for message in messages:
        verify(webhook["secret"], message.headers, message.body)
        assert message.run_id == run["id"]
    reasons = {message.content["type"]: message.content["data"]["stop_reason"] for message in messages}
    assert reasons == {"run.waiting": None, f"run.{ended['status']}": ended["stop_reason"]}  # in either order
    service.until_delivered(webhook, 2)
    told = service.client.get(f"/v1/runs/{run['id']}/deliveries").json()["data"]
    assert {one["id"] for one in told} == {message.id for message in messages}


def test_a_worker_that_is_killed_while_it_sends_is_made_up_for_by_another(service: Service) -> None:
    service.receiver.answer_in_turn(Answer(after=30), Answer())
    victim = service.new_worker()
    webhook = service.webhook()
    service.run()
    service.receiver.until(1)
    victim.kill()
    service.new_worker()
    time.sleep(1.5)
    assert len(service.receiver.messages) == 1, "nobody can know yet that it is dead"
    service.claims_are_over()
    first, second = service.receiver.until(2)
    assert (first.id, first.body) == (second.id, second.body)
    verify(webhook["secret"], second.headers, second.body)
    service.until_delivered(webhook, 1)
    assert [one["attempts"] for one in service.deliveries(webhook)] == [2]


def test_a_drain_does_not_wait_for_an_endpoint(service: Service) -> None:
    service.receiver.answers = hangs
    worker = service.new_worker()
    service.webhook("/hangs")
    service.run()
    service.receiver.until(1)
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    assert time.monotonic() - began < 2.5


def test_a_run_does_not_wait_for_an_endpoint(service: Service) -> None:
    service.receiver.answers = hangs
    service.new_worker()
    service.run()

    def seconds_a_run() -> float:
        seconds = []
        for _ in range(15):
            began = time.monotonic()
            service.run()
            seconds.append(time.monotonic() - began)
        return statistics.median(seconds)

    without = seconds_a_run()
    service.webhook("/hangs")
    hanging = seconds_a_run()
    print(f"a run takes {1000 * without:.0f} ms without webhooks, {1000 * hanging:.0f} ms beside one that hangs")
    assert hanging < without + 0.15
    service.stack.until(lambda: service.receiver.messages)


def test_without_a_key_to_sign_with_nothing_is_sent_until_there_is_one(service: Service) -> None:
    worker = service.new_worker(WEBHOOK_SIGNING_KEY="")
    assert "webhooks are not sent" in worker.log.read_text()
    webhook = service.webhook()
    service.run()
    time.sleep(2)
    assert service.receiver.messages == []
    worker.signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    service.new_worker()
    service.until_delivered(webhook, 1)
