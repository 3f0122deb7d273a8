"""What the API tells Prometheus."""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.ext.asyncio import AsyncConnection

from app import __version__
from app.devstack.access import id_of, make_key
from app.domain.principal import KeyLimits, Scope
from tests.api.conftest import StartApi, client_of
from tests.db.test_transitions import claimed, play
from tests.scripts import Script, say, submit
from tests.stack import Stack
from tests.waiting import put_to_wait, request, wait_for

Series = tuple[str, ...]
Samples = dict[Series, float]

GAUGES = (
    "agent_service_runs",
    "agent_service_oldest_queued_seconds",
    "agent_service_stuck_runs",
    "agent_service_reviews_pending",
    "agent_service_oldest_review_seconds",
    "agent_service_audit_unsealed_runs",
    "agent_service_audit_oldest_unsealed_seconds",
    "agent_service_audit_unanchored_checkpoints",
)
"""Of the whole service."""
AGENTS = "app.agents,tests.agents"
READ_FAILURES = ("agent_service_state_read_failures_total",)


def exposition(address: str) -> str:
    answer = httpx.get(f"{address}/metrics", trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return answer.text


def scraped(address: str) -> Samples:
    """Name and values of the labels, by their names → value. Of a histogram the count and the sum."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition(address))
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def grown(before: Samples, after: Samples) -> Samples:
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name, 0.0)}


def counted(before: Samples, after: Samples) -> Samples:
    """Of refusals and accepted runs, what came."""
    counters = (refused("")[0], not_let_in("")[0], accepted("")[0])
    return {name: value for name, value in grown(before, after).items() if name[0] in counters}


def refused(problem: str) -> Series:
    return "agent_service_requests_refused_total", problem


def not_let_in(reason: str) -> Series:
    return "agent_service_authentication_failures_total", reason


def accepted(agent: str) -> Series:
    return "agent_service_runs_accepted_total", agent


def requests(method: str, route: str, status: int) -> Series:
    return "http_server_request_duration_seconds_count", method, str(status), route


def test_every_series_is_there_from_the_beginning(start_api: StartApi) -> None:
    found = scraped(start_api(ENVIRONMENT="staging", IMAGE_DIGEST="sha256:abc", AGENTS=AGENTS).address)
    counters = {name: value for name, value in found.items() if name[0].endswith("_total")}
    assert {name: value for name, value in counters.items() if name[0] != accepted("")[0]} == {
        refused("rate-limited"): 0,
        refused("too-many-runs"): 0,
        refused("budget-spent"): 0,
        not_let_in("missing"): 0,
        not_let_in("invalid"): 0,
        not_let_in("missing_scope"): 0,
        ("agent_service_rate_limit_unchecked_total",): 0,
        READ_FAILURES: 0,
        ("process_cpu_seconds_total",): counters["process_cpu_seconds_total",],
    }
    assert found[accepted("support")] == found[accepted("clerk")] == 0
    assert ("agent_service_event_loop_lag_seconds_count",) in found
    assert found["agent_service_build_info", "staging", "", "sha256:abc", __version__] == 1
    gauges = gauges_of(found)
    assert {name[0] for name in gauges} == set(GAUGES)
    assert set(gauges.values()) == {0}
    assert {name[1:] for name in gauges if name[0] == "agent_service_reviews_pending"} == {
        (kind, queue) for queue in ("first", "second") for kind in ("approval", "in_doubt", "question", "limit")
    }
    of_support = {name[2] for name in gauges if name[:2] == ("agent_service_runs", "support")}
    assert of_support == {"queued", "running", "waiting"}


def test_requests_are_counted_by_method_template_and_status(stack: Stack, client: httpx.Client) -> None:
    before = scraped(stack.api.address)
    for _ in range(3):
        run = client.post("/v1/runs", json={"agent": "support", "input": "hello"}).json()
        client.get(f"/v1/runs/{run['id']}")
    client.get(f"/v1/runs/{uuid4()}")
    client.get("/v1/runs?limit=nonsense")
    client.get("/v1/nothing")
    client.get("/v2/nothing/either")
    client.put(f"/v1/runs/{run['id']}")
    client.request("PROPFIND", "/v1/runs")
    found = grown(before, scraped(stack.api.address))
    assert {name: value for name, value in found.items() if name[0] == requests("", "", 0)[0]} == {
        requests("GET", "/metrics", 200): 1,
        requests("POST", "/v1/runs", 202): 3,
        requests("GET", "/v1/runs/{run_id}", 200): 3,
        requests("GET", "/v1/runs/{run_id}", 404): 1,
        requests("GET", "/v1/runs", 422): 1,
        requests("GET", "(unknown)", 404): 2,
        requests("PUT", "/v1/runs/{run_id}", 405): 1,
        requests("_OTHER", "/v1/runs", 405): 1,
    }
    assert 0.001 < found["http_server_request_duration_seconds_sum", "POST", "202", "/v1/runs"] < 3


def test_the_time_for_which_an_answer_was_held_back_is_not_the_requests(stack: Stack, client: httpx.Client) -> None:
    run = submit(client, "toolbox", Script(stack.model_url, [say("at last", delay_s=2)]).input)
    before = scraped(stack.api.address)
    began = time.monotonic()
    assert client.get(f"/v1/runs/{run['id']}", params={"wait": 1}).json()["status"] in ("queued", "running")
    assert time.monotonic() - began >= 1
    found = grown(before, scraped(stack.api.address))
    assert found[requests("GET", "/v1/runs/{run_id}", 200)] == 1
    assert 0 < found["http_server_request_duration_seconds_sum", "GET", "200", "/v1/runs/{run_id}"] < 0.8


def test_a_client_that_goes_away_is_counted(stack: Stack, client: httpx.Client) -> None:
    before = scraped(stack.api.address)
    with socket.create_connection(("127.0.0.1", stack.api.port)) as connection:
        head = f"POST /v1/runs HTTP/1.1\r\nHost: a\r\nAuthorization: {client.headers['Authorization']}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.2)
    gone = requests("POST", "/v1/runs", 499)
    Stack.until(lambda: grown(before, scraped(stack.api.address)).get(gone) == 1)


def test_accepted_runs_are_counted_by_agent_and_what_is_sent_again_is_not(stack: Stack, client: httpx.Client) -> None:
    before = scraped(stack.api.address)
    for agent in ("support", "support", "clerk"):
        client.post("/v1/runs", json={"agent": agent, "input": "hello"})
    for _ in range(3):
        headers = {"Idempotency-Key": "once"}
        response = client.post("/v1/runs", json={"agent": "clerk", "input": "hello"}, headers=headers)
        assert response.status_code == 202
    client.post("/v1/runs", json={"agent": "nobody", "input": "hello"})
    assert counted(before, scraped(stack.api.address)) == {
        accepted("support"): 2,
        accepted("clerk"): 2,
        refused("unknown-agent"): 1,
    }


def gauges_of(found: Samples) -> Samples:
    return {name: value for name, value in found.items() if name[0] in GAUGES}


def fill(database_url: str) -> None:
    """A run that is executed, two that wait, one of them of an agent that nobody knows."""

    async def scenario(db: AsyncConnection) -> None:
        await claimed(db)  # of agent "a", which nobody knows either
        await wait_for(db, agent="clerk")
        await wait_for(db, request(seq=1), request(seq=2), agent="renamed")

    play(database_url, scenario)


@contextmanager
def without(database_url: str, servers: Stack) -> Iterator[None]:
    """Nobody is connected to the database, or can be."""
    name = database_url.rpartition("/")[2]
    with psycopg.connect(servers.postgres.url("postgres"), autocommit=True) as postgres:
        postgres.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        yield
        postgres.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


def test_gauges_of_the_whole_service_are_read_every_five_seconds_and_are_missing_while_they_cannot_be(
    start_api: StartApi, servers: Stack, database_url: str
) -> None:
    fill(database_url)
    api = start_api(AGENTS=AGENTS)
    found = scraped(api.address)
    read_at = time.monotonic()
    assert found["agent_service_runs", "clerk", "waiting"] == 1
    assert found["agent_service_runs", "clerk", "queued"] == 0
    assert found["agent_service_runs", "other", "waiting"] == 1
    assert found["agent_service_runs", "other", "running"] == 1
    assert found["agent_service_reviews_pending", "approval", "first"] == 3
    assert found["agent_service_audit_unsealed_runs",] == 3
    put_to_wait(database_url, agent="clerk")
    with without(database_url, servers):
        assert gauges_of(scraped(api.address)) == gauges_of(found)
        Stack.until(lambda: scraped(api.address)[READ_FAILURES] == 1)
        assert 4.5 < time.monotonic() - read_at < 8
        found = scraped(api.address)
        assert found[accepted("support")] == 0
        assert gauges_of(found) == {}
        assert f"# TYPE {GAUGES[0]} gauge" in exposition(api.address)
    Stack.until(lambda: scraped(api.address).get(("agent_service_runs", "clerk", "waiting")) == 2)
    assert scraped(api.address)[READ_FAILURES] == 1


def test_whoever_is_not_let_in_is_counted_by_reason(start_api: StartApi, database_url: str) -> None:
    api = start_api()
    key = make_key(database_url, tenant="own", name="test", scopes=[Scope.RUNS_READ])
    before = scraped(api.address)
    with httpx.Client(base_url=api.address, trust_env=False) as client:
        client.get("/v1/runs")
        client.get("/v1/runs", headers={"Authorization": "Basic eDp5"})
        client.get("/v1/runs", headers={"Authorization": "Bearer nonsense"})
        client.get("/v1/runs", headers={"Authorization": f"Bearer {key[:-4]}AAAA"})
        client.get("/v1/runs", headers={"Authorization": f"Bearer ask_{'0' * 12}_{'x' * 43}"})
    with client_of(api, key) as client:
        client.get("/v1/runs")
        client.get("/v1/reviews")
    assert counted(before, scraped(api.address)) == {
        not_let_in("missing"): 2,
        not_let_in("invalid"): 3,
        not_let_in("missing_scope"): 1,
        refused("unauthorized"): 5,
        refused("missing-scope"): 1,
    }


def test_whoever_asks_for_too_much_is_counted(start_api: StartApi, database_url: str) -> None:
    api = start_api()
    hasty = make_key(database_url, tenant="own", name="hasty", limits=KeyLimits(requests_per_s=0.01, burst=1))
    busy = make_key(database_url, tenant="own", name="busy", limits=KeyLimits(max_in_flight=1))
    poor = make_key(database_url, tenant="poor", name="poor")
    with psycopg.connect(database_url) as connection:
        connection.execute("INSERT INTO budgets (tenant, daily_usd, day) VALUES ('poor', 0, now()::date)")
    before = scraped(api.address)
    submission: dict[str, Any] = {"json": {"agent": "support", "input": "hello"}}
    for key, statuses in ((hasty, [202, 429, 429]), (busy, [202, 429, 429]), (poor, [429])):
        with client_of(api, key) as client:
            assert [client.post("/v1/runs", **submission).status_code for _ in statuses] == statuses
    assert counted(before, scraped(api.address)) == {
        accepted("support"): 2,
        refused("rate-limited"): 2,
        refused("too-many-runs"): 2,
        refused("budget-spent"): 1,
    }


def test_no_label_names_a_tenant_a_run_or_a_key(start_api: StartApi, database_url: str) -> None:
    api = start_api()
    key = make_key(database_url, tenant="a-tenant-of-note", name="test")
    with client_of(api, key) as client:
        run = client.post("/v1/runs", json={"agent": "support", "input": "hello"}).json()
        client.get(f"/v1/runs/{run['id']}/nothing")
        client.get("/v1/runs/00000000-0000-0000-0000-000000000000")
        client.get("/v1/a-path-that-nobody-knows")
    text = exposition(api.address)
    for name in ("a-tenant-of-note", run["id"], id_of(key), "a-path-that-nobody-knows"):
        assert name not in text
    assert set(re.findall(r"(\w+)=", text)) == {
        *("problem", "reason", "agent", "status", "queue", "kind", "le"),
        *("http_request_method", "http_route", "http_response_status_code"),
        *("version", "image_digest", "git_revision", "environment"),
    }


@pytest.mark.parametrize("redis_url", ["redis://127.0.0.1:1/0"])
def test_metrics_need_no_key_no_database_and_no_redis(start_api: StartApi, redis_url: str) -> None:
    api = start_api(DATABASE_URL="postgresql://agent@127.0.0.1:1/agents", REDIS_URL=redis_url)
    found = scraped(api.address)
    assert found["agent_service_rate_limit_unchecked_total",] == 0
    assert found[READ_FAILURES] == 1
    assert gauges_of(found) == {}


def test_a_database_that_does_not_answer_holds_a_scrape_up_for_two_seconds_once(start_api: StartApi) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = start_api(DATABASE_URL=f"postgresql://agent@127.0.0.1:{silent.getsockname()[1]}/agents")
        took = []
        for _ in range(2):
            began = time.monotonic()
            assert scraped(api.address)[READ_FAILURES] == 1
            took.append(time.monotonic() - began)
    assert took[0] < 3
    assert took[1] < 0.5
