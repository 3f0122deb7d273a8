"""A tenant's budget where runs come in: what is refused, until when, and what is not."""

import time
from decimal import Decimal
from uuid import uuid4

import httpx
import pytest

from app.devstack.access import make_key
from tests.scripts import submit
from tests.spending import give_budget, rows
from tests.stack import Stack

NOTHING_TO_SAY = "script:unknown"
FIRST_CALL = Decimal("0.00819200")
"""What 4,096 tokens cost that gpt-5-mini may answer; the input is too short to cost anything here."""
SHORT = "x" * 7


def asked_for(client: httpx.Client, agent: str = "bench", text: str = NOTHING_TO_SAY, **more: object) -> httpx.Response:
    return client.post("/v1/runs", json={"agent": agent, "input": text, **more})


def problem(response: httpx.Response) -> str:
    return str(response.json()["type"]).rpartition("/")[2].rpartition(":")[2]


def seconds_until_midnight() -> float:
    return 86_400 - time.time() % 86_400


def test_a_tenant_whose_budget_is_spent_is_told_to_come_back_at_midnight(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    give_budget(stack.database_url, tenant, "2.50", spent="2.4999")
    response = asked_for(client)
    assert (response.status_code, problem(response)) == (429, "budget-spent")
    assert response.headers["content-type"] == "application/problem+json"
    assert abs(int(response.headers["retry-after"]) - seconds_until_midnight()) < 5
    assert "of today's 2.5000 US dollars 0.0001 are left" in response.json()["detail"]
    assert "midnight UTC" in response.json()["detail"]
    assert client.get("/v1/runs").json()["data"] == []


def test_a_budget_of_nothing_stops_everything(stack: Stack, client: httpx.Client, tenant: str) -> None:
    give_budget(stack.database_url, tenant, "0")
    for agent in ("bench", "toolbox", "with-fallback"):
        assert asked_for(client, agent, limits={"max_tokens": 1}).status_code == 429


def test_a_run_is_accepted_as_long_as_its_first_call_may_fit(stack: Stack, client: httpx.Client, tenant: str) -> None:
    give_budget(stack.database_url, tenant, str(FIRST_CALL), spent="0.00000001")
    assert asked_for(client, text=SHORT).status_code == 429
    assert asked_for(client, text=SHORT, limits={"max_tokens": 4000}).status_code == 202
    give_budget(stack.database_url, tenant, str(FIRST_CALL))
    assert asked_for(client, text=SHORT).status_code == 202
    assert asked_for(client, text=SHORT * 100).status_code == 429


def test_the_dearest_of_an_agents_models_has_to_fit(stack: Stack, client: httpx.Client, tenant: str) -> None:
    give_budget(stack.database_url, tenant, "0.04")  # gpt-5 may cost 0.041, gpt-5-nano 0.0016
    assert asked_for(client, "with-fallback", text=SHORT).status_code == 429
    give_budget(stack.database_url, tenant, "0.05")
    assert asked_for(client, "with-fallback", text=SHORT).status_code == 202


def test_what_is_only_reserved_refuses_nobody(stack: Stack, client: httpx.Client, tenant: str) -> None:
    give_budget(stack.database_url, tenant, "1", reserved="1")
    assert asked_for(client, limits={"deadline_s": 0.2}).status_code == 202


def test_yesterdays_spending_refuses_nobody(stack: Stack, client: httpx.Client, tenant: str) -> None:
    give_budget(stack.database_url, tenant, "1", spent="1")
    assert asked_for(client).status_code == 429
    rows(stack.database_url, "UPDATE budgets SET day = day - 1 WHERE tenant = %s RETURNING tenant", tenant)
    assert asked_for(client).status_code == 202


def test_a_tenant_without_a_budget_and_another_tenant_are_not_concerned(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    give_budget(stack.database_url, f"{tenant}-other", "0")
    assert asked_for(client).status_code == 202
    other = make_key(stack.database_url, tenant=f"{tenant}-other", name="other")
    assert asked_for(client).status_code == 202
    client.headers["Authorization"] = f"Bearer {other}"
    assert asked_for(client).status_code == 429


def test_the_same_request_still_gives_the_run_that_it_gave(stack: Stack, client: httpx.Client, tenant: str) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    body = {"agent": "bench", "input": NOTHING_TO_SAY}
    first = client.post("/v1/runs", json=body, headers=key)
    give_budget(stack.database_url, tenant, "0")
    again = client.post("/v1/runs", json=body, headers=key)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["idempotent-replayed"] == "true"
    assert problem(client.post("/v1/runs", json={**body, "input": "another"}, headers=key)) == "idempotency-mismatch"
    refused = {"Idempotency-Key": str(uuid4())}
    assert client.post("/v1/runs", json=body, headers=refused).status_code == 429
    give_budget(stack.database_url, tenant, "1")
    assert "idempotent-replayed" not in client.post("/v1/runs", json=body, headers=refused).headers


def test_an_agent_whose_model_has_no_price_cannot_keep_to_a_budget(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    assert asked_for(client, "free").status_code == 202
    give_budget(stack.database_url, tenant, "999")
    response = asked_for(client, "free")
    assert (response.status_code, problem(response)) == (422, "unpriced-model")
    assert "retry-after" not in response.headers


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/agents"])
def test_whoever_has_spent_everything_may_still_read(
    stack: Stack, client: httpx.Client, tenant: str, path: str
) -> None:
    run = submit(client, "bench", NOTHING_TO_SAY)
    give_budget(stack.database_url, tenant, "0")
    assert client.get(path).status_code == 200
    assert client.get(f"/v1/runs/{run['id']}").status_code == 200
