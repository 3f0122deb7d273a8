"""What the API tells Prometheus."""

import re
from typing import Any

import httpx
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.devstack.access import id_of, make_key
from app.domain.principal import KeyLimits, Scope
from tests.api.conftest import StartApi, client_of

Samples = dict[tuple[str, str], float]


def scraped(address: str) -> Samples:
    """Name and value of the only label → value."""
    answer = httpx.get(f"{address}/metrics", trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def grown(before: Samples, after: Samples) -> dict[tuple[str, str], float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name, 0.0)}


def refused(problem: str) -> tuple[str, str]:
    return "agent_service_requests_refused_total", problem


def not_let_in(reason: str) -> tuple[str, str]:
    return "agent_service_authentication_failures_total", reason


def test_every_series_is_there_from_the_beginning(start_api: StartApi) -> None:
    assert scraped(start_api().address) == {
        refused("rate-limited"): 0,
        refused("too-many-runs"): 0,
        refused("budget-spent"): 0,
        not_let_in("missing"): 0,
        not_let_in("invalid"): 0,
        not_let_in("missing_scope"): 0,
        ("agent_service_rate_limit_unchecked_total", ""): 0,
    }


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
    assert grown(before, scraped(api.address)) == {
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
    assert grown(before, scraped(api.address)) == {
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
    text = httpx.get(f"{api.address}/metrics", trust_env=False).text
    for name in ("a-tenant-of-note", run["id"], id_of(key), "a-path-that-nobody-knows"):
        assert name not in text
    assert set(re.findall(r"(\w+)=", text)) == {"problem", "reason"}


@pytest.mark.parametrize("redis_url", ["redis://127.0.0.1:1/0"])
def test_metrics_need_no_key_no_database_and_no_redis(start_api: StartApi, redis_url: str) -> None:
    api = start_api(DATABASE_URL="postgresql://agent@127.0.0.1:1/agents", REDIS_URL=redis_url)
    assert ("agent_service_rate_limit_unchecked_total", "") in scraped(api.address)
