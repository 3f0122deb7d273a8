"""The number of workers that there should be, as an autoscaler asks for it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import psycopg
import pytest

from app.devstack.access import make_key
from app.devstack.processes import Reaper
from app.devstack.stack import Api
from app.domain.principal import KeyLimits, Scope
from app.gauges import FRESH_SECONDS
from tests.api.conftest import StartApi, client_of
from tests.api.test_metrics import scraped, without
from tests.scripts import Script, rest, say, submit
from tests.stack import Stack, new_directory

Json = dict[str, Any]

RULES = {"WORKER_CONCURRENCY": "5", "TARGET_DRAIN_SECONDS": "20", "MIN_WORKERS": "1", "MAX_WORKERS": "4"}
AS_JSON = {"slots_per_worker": 5, "target_drain_s": 20.0, "min_workers": 1, "max_workers": 4}
AT_REST = {"desired_workers": 1, "queued": 0, "running": 0, "busy_workers": 0, "median_run_s": 10.0, **AS_JSON}


@pytest.fixture
def api(start_api: StartApi) -> Api:
    """Without a worker."""
    return start_api(**RULES)


@pytest.fixture
def scaler(api: Api, database_url: str) -> Iterator[httpx.Client]:
    key = make_key(database_url, tenant="operators", name="autoscaler", scopes=[Scope.SCALING_READ])
    with client_of(api, key) as client:
        yield client


@pytest.fixture
def backend(api: Api, database_url: str) -> Iterator[httpx.Client]:
    key = make_key(database_url, tenant="shop", name="till", scopes=[Scope.RUNS_READ, Scope.RUNS_WRITE])
    with client_of(api, key) as client:
        yield client


def asked(scaler: httpx.Client) -> Json:
    answer = scaler.get("/v1/scaling")
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


def shows(scaler: httpx.Client, **expected: int) -> bool:
    return asked(scaler).items() >= expected.items()


def test_the_more_runs_are_queued_the_more_workers_there_should_be(
    scaler: httpx.Client, backend: httpx.Client, api: Api
) -> None:
    assert asked(scaler) == AT_REST
    for more, queued, desired in ((7, 7, 1), (9, 16, 2), (100, 116, 4)):
        for _ in range(more):
            submit(backend, "support", "hello")
        Stack.until(partial(shows, scaler, queued=queued))
        assert asked(scaler) == {**AT_REST, "queued": queued, "desired_workers": desired}
    assert scraped(api.address)["agent_service_desired_workers",] == 4
    assert scraped(api.address)["agent_service_max_workers",] == 4


def test_what_is_told_lasts_five_seconds_however_often_one_asks(scaler: httpx.Client, backend: httpx.Client) -> None:
    assert asked(scaler) == AT_REST
    read_at = time.monotonic()
    submit(backend, "support", "hello")
    assert asked(scaler) == AT_REST
    Stack.until(partial(shows, scaler, queued=1))
    assert FRESH_SECONDS - 0.5 < time.monotonic() - read_at < FRESH_SECONDS + 2


def test_while_postgres_cannot_say_there_is_no_number(
    start_api: StartApi, scaler: httpx.Client, owner_url: str, servers: Stack, database_url: str
) -> None:
    assert asked(scaler) == AT_REST
    with without(database_url, servers):
        refused = scaler.get("/v1/scaling")
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert "desired_workers" not in refused.text
    with psycopg.connect(owner_url) as connection:  # keys can be read, and runs are locked
        connection.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")

        def refusal() -> httpx.Response | None:
            answer = scaler.get("/v1/scaling")
            return answer if answer.status_code == 503 else None

        Stack.until(refusal)
        began = time.monotonic()
        refused = scaler.get("/v1/scaling")
        assert time.monotonic() - began < 1
    assert refused.json()["type"] == "urn:agent-service:problem:unavailable"
    assert refused.headers["Retry-After"] == "5"
    assert "desired_workers" not in refused.text
    Stack.until(lambda: scaler.get("/v1/scaling").status_code == 200)
    assert asked(scaler) == AT_REST


def test_only_a_key_for_it_may_ask_and_that_is_good_for_nothing_else(
    api: Api, scaler: httpx.Client, database_url: str
) -> None:
    others = [scope for scope in Scope if scope is not Scope.SCALING_READ]
    with client_of(api, make_key(database_url, tenant="shop", name="admin", scopes=others)) as administrator:
        refused = administrator.get("/v1/scaling")
    assert refused.status_code == 403
    assert refused.json()["type"] == "urn:agent-service:problem:missing-scope"
    assert httpx.get(f"{api.address}/v1/scaling", trust_env=False).status_code == 401
    for path in ("/v1/runs", "/v1/agents", "/v1/reviews", "/v1/webhooks"):
        assert scaler.get(path).status_code == 403


def test_an_autoscaler_may_not_ask_more_often_than_any_other_key(api: Api, database_url: str) -> None:
    hasty = KeyLimits(requests_per_s=0.01, burst=2)
    key = make_key(database_url, tenant="operators", name="hasty", scopes=[Scope.SCALING_READ], limits=hasty)
    with client_of(api, key) as client:
        assert [client.get("/v1/scaling").status_code for _ in range(3)] == [200, 200, 429]


def test_a_worker_that_takes_them_is_busy_and_what_they_took_is_known_when_they_end(reaper: Reaper) -> None:
    with new_directory() as directory:
        stack = Stack(directory, reaper)
        try:
            stack.start()
            key = make_key(stack.database_url, tenant="t", name="all")
            with client_of(stack.api, key) as client, ThreadPoolExecutor(3) as waiting:
                scripts = [Script(stack.model_url, [say("at last", delay_s=7)]) for _ in range(3)]
                taken = [submit(client, "toolbox", script.input) for script in scripts]
                Stack.until(partial(shows, client, running=3, queued=0, busy_workers=1, desired_workers=1))
                ended = waiting.map(partial(rest, client), taken)
                assert [run["status"] for run in ended] == ["succeeded"] * 3
                Stack.until(partial(shows, client, running=0, busy_workers=0))
                assert 7 <= asked(client)["median_run_s"] < 10
        finally:
            stack.stop()
