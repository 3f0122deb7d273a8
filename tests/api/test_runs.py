"""Runs through the API: submit, read, wait, list, cancel."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import redis

from app.devstack.access import make_key
from tests.api.conftest import StartApi, client_of
from tests.scripts import DONE, Script, audit_of, call, rest, say, submit
from tests.stack import Stack

Json = dict[str, Any]


def pages(client: httpx.Client, path: str, **params: Any) -> list[list[Json]]:
    """Every page of a list."""
    found = []
    while True:
        page = client.get(path, params=params).json()
        found.append(page["data"])
        if page["next_cursor"] is None:
            return found
        params["cursor"] = page["next_cursor"]


# -- submit


def test_an_accepted_run_is_shown_as_it_was_asked_for(client: httpx.Client) -> None:
    body = {
        "agent": "toolbox",
        "input": "script:unknown",
        "limits": {"max_steps": 2, "max_cost_usd": 0.125},
        "metadata": {"ticket": "4711"},
        "priority": "high",
    }
    response = client.post("/v1/runs", json=body)
    assert response.status_code == 202
    run = response.json()
    assert response.headers["location"] == f"/v1/runs/{run['id']}"
    assert "idempotent-replayed" not in response.headers
    assert UUID(run["id"]).version == 7
    assert {name: run[name] for name in ("agent", "input", "metadata", "priority")} == {
        name: body[name] for name in ("agent", "input", "metadata", "priority")
    }
    assert (run["status"], run["stop_reason"], run["output"], run["attempt"]) == ("queued", None, None, 0)
    assert run["limits"]["max_steps"] == 2
    assert run["limits"]["max_cost_usd"] == 0.125
    assert run["limits"]["max_tokens"] == 100_000
    assert run["usage"] == {
        "model_calls": 0,
        "input_tokens": 0,
        "cached_tokens": 0,
        "output_tokens": 0,
        "cost_usd": 0.0,
        "latency_ms": {"total": 0, "queued": 0, "active": 0, "model": 0, "tools": 0, "human": 0},
    }
    assert run["created_at"].endswith("Z")
    assert client.get(response.headers["location"]).json()["id"] == run["id"]


def test_a_run_keeps_the_id_of_its_request(client: httpx.Client) -> None:
    body = {"agent": "toolbox", "input": "script:unknown"}
    run = client.post("/v1/runs", json=body, headers={"X-Request-Id": "ticket-4711"}).json()
    accepted = client.get(f"/v1/runs/{run['id']}/audit").json()["data"][0]
    assert accepted["kind"] == "run.accepted"
    assert accepted["data"]["request_id"] == "ticket-4711"


def test_a_limit_may_be_set_where_the_agent_has_none(client: httpx.Client) -> None:
    run = submit(client, "free", "script:unknown", limits={"max_steps": 1, "max_cost_usd": None})
    assert run["limits"]["max_cost_usd"] is None
    response = client.post("/v1/runs", json={"agent": "free", "input": "x", "limits": {"max_cost_usd": 1}})
    assert response.json()["type"].endswith(":unpriced-model")


def test_the_same_request_with_the_same_key_is_the_same_run(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": f"order {uuid4()}"}
    first = client.post("/v1/runs", json={"agent": "toolbox", "input": "script:unknown"}, headers=headers)
    again = client.post(
        "/v1/runs",
        content=b'{ "priority": "normal", "input": "script:unknown", "limits": {}, "agent": "toolbox" }',
        headers={**headers, "Content-Type": "application/json"},
    )
    assert first.status_code == again.status_code == 202
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert again.json()["id"] == first.json()["id"]
    assert len(client.get("/v1/runs").json()["data"]) == 1


def test_the_same_key_from_many_at_once_is_one_run(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    body = {"agent": "toolbox", "input": "script:unknown"}
    with ThreadPoolExecutor(8) as threads:
        responses = list(threads.map(lambda _: client.post("/v1/runs", json=body, headers=headers), range(16)))
    assert {response.status_code for response in responses} == {202}
    assert len({response.json()["id"] for response in responses}) == 1
    assert sum("idempotent-replayed" not in response.headers for response in responses) == 1


def test_the_same_request_is_the_same_run_also_when_its_agent_is_gone(start_api: StartApi, own_key: str) -> None:
    headers = {"Idempotency-Key": "measured once"}
    body = {"agent": "measuring", "input": {"value": 1}}
    with client_of(start_api(AGENTS="tests.api.flawed_agents"), own_key) as client:
        run = client.post("/v1/runs", json=body, headers=headers).json()
    with client_of(start_api(), own_key) as client:
        again = client.post("/v1/runs", json=body, headers=headers)
        assert (again.status_code, again.json()["id"]) == (202, run["id"])
        assert client.post("/v1/runs", json=body).json()["type"].endswith(":unknown-agent")


def test_another_tenant_may_use_the_same_key(stack: Stack, client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "the same"}
    body = {"agent": "toolbox", "input": "script:unknown"}
    first = client.post("/v1/runs", json=body, headers=headers).json()
    with client_of(stack.api, make_key(stack.database_url, tenant=f"other-{uuid4().hex}", name="test")) as other:
        assert other.post("/v1/runs", json=body, headers=headers).json()["id"] != first["id"]


def test_a_run_is_accepted_without_redis_and_says_so_nowhere(start_api: StartApi, own_key: str) -> None:
    api = start_api(REDIS_URL="redis://127.0.0.1:1/0")
    with client_of(api, own_key) as client:
        assert client.get("/health").json()["status"] == "degraded"
        assert client.get("/health/ready").status_code == 200
        run = submit(client, "support", "hello")
        assert run["status"] == "queued"
        began = time.monotonic()
        ids = {submit(client, "support", "hello")["id"] for _ in range(20)}
        assert len(ids) == 20
        assert time.monotonic() - began < 5
        cancelled = client.post(f"/v1/runs/{run['id']}/cancel")
        assert cancelled.status_code == 202


def test_a_run_is_on_the_queue_under_its_own_id(start_api: StartApi, own_key: str, redis_url: str) -> None:
    with client_of(start_api(), own_key) as client, redis.Redis.from_url(redis_url) as server:
        normal, high = submit(client, "support", "hello"), submit(client, "support", "hello", priority="high")
        Stack.until(lambda: server.llen("rq:queue:runs") == 2)
        assert [entry.decode() for entry in server.lrange("rq:queue:runs", 0, -1)] == [high["id"], normal["id"]]


# -- wait


def test_a_waiting_request_is_woken_when_the_run_ends(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [call("rest", {"seconds": 0.8}), DONE])
    run = submit(client, "toolbox", script.input)
    began = time.monotonic()
    ended = client.get(f"/v1/runs/{run['id']}", params={"wait": 30}).json()
    assert ended["status"] == "succeeded"
    assert time.monotonic() - began < 3  # the fallback looks every 5 s


def test_many_may_wait_for_the_same_run_and_for_others(stack: Stack, client: httpx.Client) -> None:
    scripts = [Script(stack.model_url, [call("rest", {"seconds": 0.5}), DONE]) for _ in range(5)]
    ids = [submit(client, "toolbox", script.input)["id"] for script in scripts]
    with ThreadPoolExecutor(15) as threads:
        wait = lambda run_id: client.get(f"/v1/runs/{run_id}", params={"wait": 20}).json()["status"]  # noqa: E731
        assert set(threads.map(wait, ids * 3)) == {"succeeded"}


def test_a_wait_that_is_over_gives_the_run_as_it_is(start_api: StartApi, own_key: str) -> None:
    with client_of(start_api(), own_key) as client:  # no worker takes it
        run = submit(client, "support", "hello")
        began = time.monotonic()
        waited = client.get(f"/v1/runs/{run['id']}", params={"wait": 0.6})
        assert waited.json()["status"] == "queued"
        assert 0.5 < time.monotonic() - began < 2


def test_a_wait_for_a_run_at_rest_is_no_wait(stack: Stack, client: httpx.Client) -> None:
    run = submit(client, "toolbox", Script(stack.model_url, [say("late", delay_s=20)]).input)
    client.post(f"/v1/runs/{run['id']}/cancel")
    began = time.monotonic()
    assert client.get(f"/v1/runs/{run['id']}", params={"wait": 30}).json()["status"] == "cancelled"
    assert time.monotonic() - began < 2


def test_a_lost_signal_costs_seconds_not_the_answer(start_api: StartApi, own_key: str, redis_url: str) -> None:
    """The API that waits listens to another Redis database's channel than the one that cancels would reach: none."""
    deaf = start_api(REDIS_URL="redis://127.0.0.1:1/0")
    other = start_api()
    with client_of(deaf, own_key) as waiting, client_of(other, own_key) as cancelling, ThreadPoolExecutor(1) as thread:
        run = submit(cancelling, "support", "hello")
        answer = thread.submit(waiting.get, f"/v1/runs/{run['id']}", params={"wait": 30})
        time.sleep(0.3)
        began = time.monotonic()
        cancelling.post(f"/v1/runs/{run['id']}/cancel")
        assert answer.result().json()["status"] == "cancelled"
        assert time.monotonic() - began < 7


def test_waiting_requests_hold_no_database_connection(start_api: StartApi, own_key: str) -> None:
    """More than the pool has connections wait, and others are answered as if nobody did."""

    async def scenario(address: str) -> None:
        headers = {"Authorization": f"Bearer {own_key}"}
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(
            base_url=address, headers=headers, timeout=30, limits=limits, trust_env=False
        ) as client:
            run = (await client.post("/v1/runs", json={"agent": "support", "input": "hello"})).json()
            path = f"/v1/runs/{run['id']}"
            waiting = [asyncio.create_task(client.get(path, params={"wait": 20})) for _ in range(50)]
            gone = [asyncio.create_task(client.get(path, params={"wait": 20})) for _ in range(20)]
            await asyncio.sleep(1)
            for task in gone:  # their connections are closed
                task.cancel()
            began = time.monotonic()
            assert (await client.get(path)).status_code == 200
            assert (await client.post(f"{path}/cancel")).status_code == 202
            answers = await asyncio.gather(*waiting)
            assert time.monotonic() - began < 4
            assert {answer.json()["status"] for answer in answers} == {"cancelled"}

    asyncio.run(scenario(start_api().address))


# -- list


def test_a_list_is_paged_newest_first_without_gaps_or_repeats(client: httpx.Client) -> None:
    ids = [submit(client, "toolbox", f"script:unknown {number}")["id"] for number in range(7)]
    found = pages(client, "/v1/runs", limit=3)
    assert [len(page) for page in found] == [3, 3, 1]
    assert [run["id"] for page in found for run in page] == ids[::-1]
    assert [len(page) for page in pages(client, "/v1/runs", limit=7)] == [7]


def test_a_new_run_does_not_move_the_next_page(client: httpx.Client) -> None:
    ids = [submit(client, "toolbox", "script:unknown")["id"] for _ in range(4)]
    first = client.get("/v1/runs", params={"limit": 2}).json()
    submit(client, "toolbox", "script:unknown")
    second = client.get("/v1/runs", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [run["id"] for run in first["data"] + second["data"]] == ids[::-1]


def test_a_list_can_be_narrowed(client: httpx.Client) -> None:
    kept = submit(client, "hasty", "script:unknown")["id"]
    dropped = submit(client, "toolbox", "script:unknown")["id"]
    client.post(f"/v1/runs/{dropped}/cancel")

    def listed(**params: str) -> set[str]:
        return {run["id"] for run in client.get("/v1/runs", params=params).json()["data"]}

    assert listed(agent="hasty") == {kept}
    assert listed(status="cancelled", agent="toolbox") <= {dropped}
    assert listed(agent="nobody") == set()
    assert listed() == {kept, dropped}


def test_steps_and_events_are_paged_in_the_order_in_which_they_happened(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [call("echo", {"text": "a"}), call("echo", {"text": "b"}), DONE])
    run = rest(client, submit(client, "toolbox", script.input))
    path = f"/v1/runs/{run['id']}"
    steps = pages(client, f"{path}/steps", limit=2)
    assert [len(page) for page in steps] == [2, 2, 1]
    assert [step["seq"] for page in steps for step in page] == [0, 1, 2, 3, 4]
    assert [step["kind"] for page in steps for step in page] == ["model", "tool", "model", "tool", "model"]
    assert all(isinstance(step["cost_usd"], float) for page in steps for step in page if step["kind"] == "model")
    events = [event for page in pages(client, f"{path}/audit", limit=3) for event in page]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["kind"] for event in events if event["kind"] != "run.read"] == audit_of(client, run)


# -- cancel


def test_a_cancelled_run_can_be_cancelled_again_and_stays_as_it_is(stack: Stack, client: httpx.Client) -> None:
    run = submit(client, "toolbox", Script(stack.model_url, [say("late", delay_s=20)]).input)
    response = client.post(f"/v1/runs/{run['id']}/cancel")
    again = client.post(f"/v1/runs/{run['id']}/cancel")
    assert response.status_code == again.status_code == 202
    assert response.json() == again.json()
    assert again.json()["status"] == again.json()["stop_reason"] == "cancelled"
    assert audit_of(client, run).count("run.cancelled") == 1


def test_a_run_that_has_ended_cannot_be_cancelled(stack: Stack, client: httpx.Client) -> None:
    run = rest(client, submit(client, "toolbox", Script(stack.model_url, [DONE]).input))
    response = client.post(f"/v1/runs/{run['id']}/cancel")
    assert response.status_code == 409
    assert response.json()["type"] == "urn:agent-service:problem:run-ended"
    assert client.get(f"/v1/runs/{run['id']}").json() == run


# -- agents, health, logs


def test_agents_are_listed_with_what_they_take_and_may_use(client: httpx.Client) -> None:
    agents = {agent["name"]: agent for agent in client.get("/v1/agents").json()["data"]}
    assert agents["support"]["input_schema"]["type"] == "string"
    assert agents["support"]["output_schema"]["properties"]["citations"]
    assert agents["typed"]["input_schema"]["required"] == ["subject"]
    assert agents["free"]["limits"]["max_cost_usd"] is None
    assert list(agents) == sorted(agents)


def test_health_and_version_need_no_key(stack: Stack) -> None:
    with httpx.Client(base_url=stack.api.address, trust_env=False) as stranger:
        assert stranger.get("/health/live").json() == {"status": "ok"}
        for path in ("/health", "/health/ready"):
            health = stranger.get(path).json()
            assert health["status"] == "ok"
            assert {name: part["status"] for name, part in health["parts"].items()} == {
                "postgres": "ok",
                "schema": "ok",
                "redis": "ok",
            }
        assert set(stranger.get("/version").json()) == {"version", "image_digest", "git_revision", "environment"}


def test_an_unmigrated_database_is_not_ready(stack: Stack, start_api: StartApi) -> None:
    name = f"empty_{uuid4().hex}"
    api = start_api(DATABASE_URL=stack.postgres.create_database(name))
    try:
        response = httpx.get(f"{api.address}/health/ready", trust_env=False)
        assert response.status_code == 503
        assert response.json()["detail"] == "schema is behind"
    finally:
        api.stop()
        stack.postgres.drop_database(name)


def test_a_request_is_one_line_in_the_log_and_a_probe_none(start_api: StartApi, own_key: str) -> None:
    api = start_api()
    with client_of(api, own_key) as client:
        run = submit(client, "support", "hello")
        client.get(f"/v1/runs/{run['id']}", headers={"X-Request-Id": "look-for-me"})
        client.get("/health")
    requests = [line for line in map(json.loads, api.log.read_text().splitlines()) if line["event"] == "request"]
    assert [line["path"] for line in requests] == ["/v1/runs", "/v1/runs/{run_id}"]
    line = requests[-1]
    assert (line["request_id"], line["method"], line["status"], line["tenant"]) == ("look-for-me", "GET", 200, "own")
    assert line["duration_ms"] > 0
    assert own_key.split("_")[2] not in api.log.read_text()
    assert urlsplit(api.address).port
