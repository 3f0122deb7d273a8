"""How many runs of a key may be queued or running: exactly, however many ask at once. No worker takes them here."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from uuid import uuid4

import httpx
import psycopg
import pytest

from app.devstack.access import id_of, make_key, replace_key
from app.devstack.processes import Reaper, start_together
from app.devstack.stack import Api
from app.domain.principal import KeyLimits
from app.intake import MARGIN
from tests.stack import TEMPLATE, Stack, clean_env
from tests.waiting import put_to_wait

Allowed = Callable[[int], str]


@pytest.fixture(scope="module")
def database_url(servers: Stack) -> Iterator[str]:
    """One for all tests here: each has a tenant and a key of its own."""
    name = f"in_flight_{uuid4().hex}"
    servers.postgres.create_database(name, template=TEMPLATE)
    yield servers.postgres.service_url(name)
    servers.postgres.drop_database(name)


@pytest.fixture(scope="module")
def addresses(
    servers: Stack, database_url: str, reaper: Reaper, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[str]]:
    """Two API processes."""
    directory = tmp_path_factory.mktemp("in-flight")
    apis = [Api(f"api-{number}", log=directory / f"{number}.log", reaper=reaper) for number in (1, 2)]
    for api in apis:
        api.env = clean_env(DATABASE_URL=database_url, REDIS_URL=servers.valkey.url(2)) | api.own_env
    try:
        start_together(*apis)
        yield [api.address for api in apis]
    finally:
        for api in apis:
            api.stop()


@pytest.fixture
def address(addresses: list[str]) -> str:
    return addresses[0]


@pytest.fixture
def allowed(database_url: str, tenant: str) -> Allowed:
    """A key that may have so many runs in flight, and is not held up otherwise."""

    def make(max_in_flight: int) -> str:
        limits = KeyLimits(requests_per_s=10_000, burst=10_000, max_in_flight=max_in_flight)
        return make_key(database_url, tenant=tenant, name="test", limits=limits)

    return make


def connect(address: str, key: str) -> httpx.Client:
    limits = httpx.Limits(max_connections=100)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=address, headers=headers, timeout=60, trust_env=False, limits=limits)


def submit(client: httpx.Client, key: str | None = None) -> httpx.Response:
    headers = {"Idempotency-Key": key} if key else {}
    return client.post("/v1/runs", json={"agent": "support", "input": "hello"}, headers=headers)


def submit_at_once(clients: Sequence[httpx.Client], times: int) -> list[int]:
    """Statuses, sorted."""
    with ThreadPoolExecutor(30) as threads:
        return sorted(threads.map(lambda client: submit(client).status_code, islice(cycle(clients), times)))


def runs_of(database_url: str, key: str) -> int:
    with psycopg.connect(database_url) as connection:
        row = connection.execute("SELECT count(*) FROM runs WHERE api_key_id = %s", [id_of(key)]).fetchone()
    assert row is not None
    return int(row[0])


def test_what_exceeds_the_limit_is_refused_and_leaves_nothing_behind(
    address: str, allowed: Allowed, database_url: str, tenant: str
) -> None:
    key = allowed(2)
    with connect(address, key) as client:
        assert [submit(client).status_code for _ in range(2)] == [202, 202]
        refused = submit(client)
        assert (refused.status_code, refused.json()["type"]) == (429, "urn:agent-service:problem:too-many-runs")
        assert refused.json()["detail"] == "2 runs of this key are queued or running, and it may have no more"
        assert int(refused.headers["Retry-After"]) >= 1
    assert runs_of(database_url, key) == 2
    with psycopg.connect(database_url) as connection:
        audited = connection.execute("SELECT count(DISTINCT run_id) FROM audit_events WHERE tenant = %s", [tenant])
        assert audited.fetchone() == (2,)


def test_many_at_once_get_exactly_the_limit_from_several_processes(
    addresses: list[str], allowed: Allowed, database_url: str
) -> None:
    key = allowed(5)
    with connect(addresses[0], key) as first, connect(addresses[1], key) as second:
        assert submit_at_once([first, second], 30) == [202] * 5 + [429] * 25
        assert submit_at_once([first, second], 30) == [429] * 30
    assert runs_of(database_url, key) == 5


def test_a_great_limit_is_kept_as_exactly(addresses: list[str], allowed: Allowed, database_url: str) -> None:
    most = MARGIN + 4
    key = allowed(most)
    with connect(addresses[0], key) as first, connect(addresses[1], key) as second:
        assert submit_at_once([first, second], most + 30) == [202] * most + [429] * 30
    assert runs_of(database_url, key) == most


def test_the_limit_is_one_key_s_and_not_its_tenant_s(address: str, allowed: Allowed) -> None:
    with connect(address, allowed(1)) as first, connect(address, allowed(1)) as second:
        assert [submit(client).status_code for client in (first, first, second, second)] == [202, 429, 202, 429]


def test_whoever_has_two_keys_for_a_while_has_one_limit(address: str, allowed: Allowed, database_url: str) -> None:
    old = allowed(5)
    new = replace_key(database_url, old)
    with connect(address, old) as before, connect(address, new) as after:
        assert submit_at_once([before, after], 30) == [202] * 5 + [429] * 25
        assert [submit(before).status_code, submit(after).status_code] == [429, 429]
    assert runs_of(database_url, old) + runs_of(database_url, new) == 5


def test_runs_of_two_keys_of_one_holder_are_accepted_one_after_the_other(
    address: str, allowed: Allowed, database_url: str
) -> None:
    old = allowed(5)
    new = replace_key(database_url, old)
    with connect(address, new) as client, ThreadPoolExecutor(1) as thread:
        with psycopg.connect(database_url) as busy:
            busy.execute("SELECT FROM api_keys WHERE id = %s FOR NO KEY UPDATE", [id_of(old)])
            accepted = thread.submit(submit, client)
            time.sleep(0.5)
            assert not accepted.done()
        assert accepted.result().status_code == 202


def test_a_key_made_by_the_release_before_is_limited_also_when_it_is_replaced(
    address: str, allowed: Allowed, database_url: str
) -> None:
    old = allowed(2)
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE api_keys SET holder = NULL WHERE id = %s", [id_of(old)])
    with connect(address, old) as before:
        assert submit(before).status_code == 202
        new = replace_key(database_url, old)
        with connect(address, new) as after:
            assert [submit(client).status_code for client in (after, before, after)] == [202, 429, 429]


# -- what does not count


def test_a_request_sent_again_gives_its_run_also_at_the_limit(address: str, allowed: Allowed) -> None:
    with connect(address, allowed(1)) as client:
        first = submit(client, "the same")
        assert first.status_code == 202
        again = submit(client, "the same")
        assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
        assert again.headers["Idempotent-Replayed"] == "true"
        assert submit(client, "another").status_code == 429
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: submit(client, "the same"), range(16)))
        assert {answer.json()["id"] for answer in answers} == {first.json()["id"]}


def test_the_same_request_from_many_at_once_takes_one_place(address: str, allowed: Allowed, database_url: str) -> None:
    key = allowed(1)
    with connect(address, key) as client, ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda _: submit(client, "the same"), range(32)))
    assert [answer.status_code for answer in answers] == [202] * 32
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert runs_of(database_url, key) == 1


def test_a_run_that_has_ended_makes_room(address: str, allowed: Allowed) -> None:
    with connect(address, allowed(1)) as client:
        run = submit(client).json()
        assert submit(client).status_code == 429
        assert client.post(f"/v1/runs/{run['id']}/cancel").status_code == 202
        assert [submit(client).status_code, submit(client).status_code] == [202, 429]


def test_a_run_that_waits_for_a_person_does_not_count_until_it_goes_on(
    address: str, allowed: Allowed, database_url: str, tenant: str
) -> None:
    key = allowed(2)
    for _ in range(3):
        put_to_wait(database_url, tenant=tenant, submitter=id_of(key))
    with connect(address, key) as client:
        (review, *_) = client.get("/v1/reviews").json()["data"]
        body = {"decision": "approve", "args_hash": review["args_hash"]}
        assert client.post(f"/v1/reviews/{review['id']}/decision", json=body).status_code == 200
        assert [submit(client).status_code, submit(client).status_code] == [202, 429]


def test_a_running_run_counts(address: str, allowed: Allowed, database_url: str) -> None:
    with connect(address, allowed(1)) as client:
        run = submit(client).json()
        with psycopg.connect(database_url) as connection:
            connection.execute(
                """
                UPDATE runs
                SET status = 'running', lease_token = gen_random_uuid(), lease_until = now() + interval '1 hour'
                WHERE id = %s
                """,
                [run["id"]],
            )
        assert submit(client).status_code == 429


def test_a_decided_run_goes_on_although_there_is_no_room(
    address: str, allowed: Allowed, database_url: str, tenant: str
) -> None:
    key = allowed(1)
    put_to_wait(database_url, tenant=tenant, submitter=id_of(key))
    with connect(address, key) as client:
        assert submit(client).status_code == 202
        (review,) = client.get("/v1/reviews").json()["data"]
        body = {"decision": "approve", "args_hash": review["args_hash"]}
        assert client.post(f"/v1/reviews/{review['id']}/decision", json=body).status_code == 200
        assert client.get(f"/v1/runs/{review['run_id']}").json()["status"] == "queued"
