"""Whose trace a run belongs to, where its own is found, and where its time went."""

from typing import Any

import httpx
import psycopg
import pytest

from tests.api.conftest import StartApi, client_of
from tests.scripts import DONE, Script, call, rest, submit
from tests.stack import Stack

Json = dict[str, Any]
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def submitted(client: httpx.Client, *headers: tuple[str, str]) -> Json:
    """A run, submitted with these headers beside those that every request has."""
    body = {"agent": "toolbox", "input": "script:unknown"}
    response = client.post("/v1/runs", json=body, headers=[*client.headers.items(), *headers])
    assert response.status_code == 202, response.text
    run: Json = response.json()
    return run


def traceparent_of(stack: Stack, run: Json) -> str | None:
    with psycopg.connect(stack.database_url) as connection:
        row = connection.execute("SELECT traceparent FROM runs WHERE id = %s", [run["id"]]).fetchone()
    assert row is not None
    found: str | None = row[0]
    return found


def test_whose_trace_a_run_belongs_to_is_kept_with_it(stack: Stack, client: httpx.Client) -> None:
    for name in ("traceparent", "Traceparent", "TRACEPARENT"):
        assert traceparent_of(stack, submitted(client, (name, TRACEPARENT))) == TRACEPARENT
    assert traceparent_of(stack, submitted(client)) is None


def test_of_a_later_version_what_is_known_is_kept(stack: Stack, client: httpx.Client) -> None:
    later = f"cc{TRACEPARENT[2:]}-{'x' * 10_000}"
    assert traceparent_of(stack, submitted(client, ("traceparent", later))) == TRACEPARENT


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "nonsense")],
        [("traceparent", "")],
        [("traceparent", TRACEPARENT.upper())],
        [("traceparent", f"{TRACEPARENT}-more")],
        [("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)],
        [("traceparent", f"{TRACEPARENT}, {TRACEPARENT}")],
    ],
)
def test_a_malformed_header_harms_nothing(stack: Stack, client: httpx.Client, headers: list[tuple[str, str]]) -> None:
    assert traceparent_of(stack, submitted(client, *headers)) is None


def test_the_same_request_in_another_trace_is_the_same_run(stack: Stack, client: httpx.Client) -> None:
    key = ("Idempotency-Key", "once")
    first = submitted(client, key, ("traceparent", TRACEPARENT))
    again = submitted(client, key, ("traceparent", TRACEPARENT.replace("4bf9", "beef")))
    assert again["id"] == first["id"]
    assert traceparent_of(stack, first) == TRACEPARENT


def test_the_header_is_documented(client: httpx.Client) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/runs"]["post"]
    (header,) = [parameter for parameter in operation["parameters"] if parameter["name"] == "traceparent"]
    assert (header["in"], header["required"]) == ("header", False)
    assert "W3C Trace Context" in header["description"]


def test_a_run_says_where_its_trace_is_found(start_api: StartApi, own_key: str) -> None:
    api = start_api(
        LANGFUSE_PUBLIC_KEY="pk",
        LANGFUSE_SECRET_KEY="sk",
        LANGFUSE_HOST="https://langfuse.example.com",
        TRACE_URLS='{"tempo": "https://grafana.example.com/tempo/{trace_id}?run={run_id}"}',
    )
    with client_of(api, own_key) as client:
        run = submit(client, "support", "nobody takes it")
        trace_id = run["id"].replace("-", "")
        (listed,) = client.get("/v1/runs").json()["data"]
        read = client.get(f"/v1/runs/{run['id']}").json()
        cancelled = client.post(f"/v1/runs/{run['id']}/cancel").json()
    for shown in (run, listed, read, cancelled):
        assert shown["trace_id"] == trace_id
        assert shown["traces"] == {
            "langfuse": f"https://langfuse.example.com/trace/{trace_id}",
            "tempo": f"https://grafana.example.com/tempo/{trace_id}?run={run['id']}",
        }


def test_a_run_says_where_its_time_went(stack: Stack, client: httpx.Client) -> None:
    asked = call("refund", {"order": "A-1", "amount": "75"}, delay_s=0.3)
    run = submit(client, "clerk", Script(stack.model_url, [call("rest", {"seconds": 0.2}), asked, DONE]).input)
    assert run["traces"] == {}
    waiting = rest(client, run)
    assert waiting["status"] == "waiting"
    Stack.until(lambda: client.get(f"/v1/runs/{run['id']}").json()["usage"]["latency_ms"]["human"] >= 200)
    (review,) = client.get("/v1/reviews").json()["data"]
    decision = {"decision": "approve", "args_hash": review["args_hash"]}
    assert client.post(f"/v1/reviews/{review['id']}/decision", json=decision).status_code == 200
    ended = rest(client, run)
    assert ended["status"] == "succeeded"
    (listed,) = client.get("/v1/runs").json()["data"]
    latency = ended["usage"]["latency_ms"]
    assert listed["usage"]["latency_ms"] == latency
    assert 300 <= latency["model"] <= latency["active"] - latency["tools"]
    assert latency["tools"] >= 200
    assert latency["human"] >= 200
    assert latency["queued"] >= 0
    parts = latency["queued"] + latency["active"] + latency["human"]
    assert parts <= latency["total"] <= parts + 5
