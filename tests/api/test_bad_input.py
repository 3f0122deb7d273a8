"""Bad input gets a clear answer, and leaves nothing behind. Over real HTTP."""

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text

from app.api.body import MAX_DIGITS
from app.api.errors import PROBLEM_JSON
from app.api.middleware import MAX_BODY_BYTES
from app.db import keys
from app.db.engine import make_engine
from app.devstack.access import make_key
from app.domain.pointer import MAX_DEPTH
from app.domain.principal import Scope
from tests.api.conftest import StartApi, client_of
from tests.scripts import submit
from tests.stack import Stack, clean_env

JSON = {"Content-Type": "application/json"}


def expect(response: httpx.Response, status: int, problem: str) -> dict[str, Any]:
    """The response is a complete problem of this kind."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM_JSON
    body: dict[str, Any] = response.json()
    assert body["type"] == f"urn:agent-service:problem:{problem}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    return body


def raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """As they go over the wire: also what a client would not send by itself."""
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


def pointers(problem: dict[str, Any]) -> list[str]:
    return [error["pointer"] for error in problem["errors"]]


@pytest.fixture
def nothing_stored(client: httpx.Client) -> Iterator[None]:
    yield
    assert client.get("/v1/runs").json()["data"] == []


# -- bodies


def run_with(**changes: Any) -> bytes:
    return json.dumps({"agent": "toolbox", "input": "hello", **changes}).encode()


def nested(depth: int) -> bytes:
    """A run whose input makes the body this deep; the body itself is the first level."""
    return b'{"agent":"toolbox","input":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


BAD_RUNS = {
    "unknown agent": (run_with(agent="nobody"), "unknown-agent", ["#/agent"]),
    "agent of the wrong type": (run_with(agent=5), "invalid-request", ["#/agent"]),
    "agent missing": (b'{"input":"hello"}', "invalid-request", ["#/agent"]),
    "input missing": (b'{"agent":"toolbox"}', "invalid-request", ["#/input"]),
    "input of the wrong type": (run_with(input={"a": 1}), "invalid-request", ["#/input"]),
    "input null": (run_with(input=None), "invalid-request", ["#/input"]),
    "empty input": (run_with(input=""), "invalid-request", ["#/input"]),
    "blank input": (run_with(input=" \n "), "invalid-request", ["#/input"]),
    "too long input": (run_with(input="x" * 100_001), "invalid-request", ["#/input"]),
    "typed input with a wrong field": (
        run_with(agent="typed", input={"subject": "x", "urgent": "perhaps"}),
        "invalid-request",
        ["#/input/urgent"],
    ),
    "typed input that only looks right": (
        run_with(agent="typed", input={"subject": "x", "urgent": 0}),
        "invalid-request",
        ["#/input/urgent"],
    ),
    "typed input with an unknown field": (
        run_with(agent="typed", input={"subject": "x", "colour": 1}),
        "invalid-request",
        ["#/input/colour"],
    ),
    "limits above the agent's": (
        run_with(limits={"max_steps": 11, "max_tokens": 50_000, "max_cost_usd": 0.51}),
        "limit-raised",
        ["#/limits/max_cost_usd", "#/limits/max_steps"],
    ),
    "no cost limit": (run_with(limits={"max_cost_usd": None}), "limit-raised", ["#/limits/max_cost_usd"]),
    "limit of zero": (run_with(limits={"max_steps": 0}), "invalid-request", ["#/limits/max_steps"]),
    "limit below zero": (run_with(limits={"deadline_s": -1}), "invalid-request", ["#/limits/deadline_s"]),
    "limit as text": (run_with(limits={"max_steps": "5"}), "invalid-request", ["#/limits/max_steps"]),
    "limit true": (run_with(limits={"max_cost_usd": True}), "invalid-request", ["#/limits/max_cost_usd"]),
    "cost limit as text": (
        run_with(limits={"max_cost_usd": "0.10"}),
        "invalid-request",
        ["#/limits/max_cost_usd"],
    ),
    "limit null": (run_with(limits={"max_steps": None}), "invalid-request", ["#/limits/max_steps"]),
    "unknown limit": (run_with(limits={"max_stepz": 5}), "invalid-request", ["#/limits/max_stepz"]),
    "limits not an object": (run_with(limits=[]), "invalid-request", ["#/limits"]),
    "unpriced model with a cost limit": (run_with(agent="unpriced"), "unpriced-model", None),
    "unknown field": (run_with(inputs=1), "invalid-request", ["#/inputs"]),
    "priority unknown": (run_with(priority="urgent"), "invalid-request", ["#/priority"]),
    "metadata nested": (run_with(metadata={"a": {"b": "c"}}), "invalid-request", ["#/metadata/a"]),
    "metadata with 17 pairs": (
        run_with(metadata={str(number): "" for number in range(17)}),
        "invalid-request",
        ["#/metadata"],
    ),
    "metadata with a long value": (run_with(metadata={"a/b": "x" * 513}), "invalid-request", ["#/metadata/a~1b"]),
    "metadata with a long name": (run_with(metadata={"x" * 65: ""}), "invalid-request", ["#/metadata/" + "x" * 65]),
    "empty body": (b"", "invalid-request", None),
    "not JSON": (b"agent=toolbox", "invalid-request", None),
    "cut off": (b'{"agent":"toolbox"', "invalid-request", None),
    "not UTF-8": (b'{"agent":"toolbox","input":"\xff"}', "invalid-request", None),
    "UTF-16": (run_with().decode().encode("utf-16"), "invalid-request", None),
    "not an object": (b"[]", "invalid-request", None),
    "null": (b"null", "invalid-request", None),
    "a name twice": (b'{"agent":"toolbox","agent":"typed","input":"x"}', "invalid-request", None),
    "NaN": (b'{"agent":"toolbox","input":NaN}', "invalid-request", None),
    "infinity": (b'{"agent":"toolbox","input":[-Infinity]}', "invalid-request", None),
    "a float beyond all": (b'{"agent":"toolbox","input":1e999}', "invalid-request", None),
    "a huge integer": (b'{"agent":"toolbox","input":%s}' % (b"9" * (MAX_DIGITS + 1)), "invalid-request", None),
    "an integer that Python refuses": (b'{"agent":"toolbox","input":%s}' % (b"9" * 5_000), "invalid-request", None),
    "NUL in a string": (run_with(input="a\0b"), "invalid-request", ["#/input"]),
    "NUL in the agent's name": (run_with(agent="a\0b"), "invalid-request", ["#/agent"]),
    "lone surrogate in a string": (run_with(input=["x", "\ud800"]), "invalid-request", ["#/input/1"]),
    "low surrogate": (run_with(metadata={"a": "\udfff"}), "invalid-request", ["#/metadata/a"]),
    "surrogates in the wrong order": (run_with(input="\udc00\ud800"), "invalid-request", ["#/input"]),
    "NUL in a name": (run_with(metadata={"a\0": "x"}), "invalid-request", ["#/metadata"]),
    "lone surrogate in a name": (run_with(input={"\udabc": 1}), "invalid-request", ["#/input"]),
    "one level too deep": (nested(MAX_DEPTH + 1), "invalid-request", ["#/input" + "/0" * (MAX_DEPTH - 1)]),
    "far too deep": (nested(100_000), "invalid-request", None),
    "objects far too deep": (b'{"agent":"toolbox","input":' + b'{"a":' * 100_000, "invalid-request", None),
}


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_bad_run_is_refused(client: httpx.Client, name: str) -> None:
    body, problem, where = BAD_RUNS[name]
    answer = expect(client.post("/v1/runs", content=body, headers=JSON), 422, problem)
    if where is None:
        assert "errors" not in answer or problem == "unpriced-model"
    else:
        assert pointers(answer) == where


def test_the_deepest_body_that_is_allowed_is_validated(client: httpx.Client) -> None:
    answer = expect(client.post("/v1/runs", content=nested(MAX_DEPTH), headers=JSON), 422, "invalid-request")
    assert answer["detail"] == "the input is not what agent toolbox takes"


def test_a_surrogate_pair_is_a_character_like_others(client: httpx.Client) -> None:
    response = client.post("/v1/runs", content=b'{"agent":"toolbox","input":"\\ud83d\\ude00"}', headers=JSON)
    assert response.json()["input"] == "\N{GRINNING FACE}"


def test_1_0_is_an_integer_and_what_a_float_cannot_hold_exactly_is_none(client: httpx.Client) -> None:
    run = {"agent": "toolbox", "input": "x"}
    for number in ("6.0", "6e0", "60.0e-1"):
        body = json.dumps({**run, "limits": {"max_steps": 0}}).replace("0}", f"{number}}}")
        response = client.post("/v1/runs", content=body, headers=JSON)
        assert response.status_code == 202, response.text
        assert response.json()["limits"]["max_steps"] == 6
    for number in ("6.5", "1e300"):
        body = json.dumps({**run, "limits": {"max_steps": 0}}).replace("0}", f"{number}}}")
        answer = expect(client.post("/v1/runs", content=body, headers=JSON), 422, "invalid-request")
        assert pointers(answer) == ["#/limits/max_steps"]


def test_an_answer_names_a_few_wrong_places_not_a_million(client: httpx.Client) -> None:
    body = run_with(metadata={str(number): 0 for number in range(1_000)})
    answer = expect(client.post("/v1/runs", content=body, headers=JSON), 422, "invalid-request")
    assert 1 <= len(answer["errors"]) <= 20


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
@pytest.mark.usefixtures("nothing_stored")
def test_a_body_that_is_not_declared_as_json_is_refused(client: httpx.Client, content_type: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    expect(client.post("/v1/runs", content=run_with(), headers=headers), 415, "unsupported-media-type")


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.a+json"]
)
def test_every_way_to_declare_json_is_fine(client: httpx.Client, content_type: str) -> None:
    response = client.post("/v1/runs", content=run_with(), headers={"Content-Type": content_type})
    assert response.status_code == 202


def padded(size: int) -> bytes:
    """A good run of this many bytes."""
    body = run_with()
    return body + b" " * (size - len(body))


def in_chunks(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 65_536):
        yield body[start : start + 65_536]


@pytest.mark.usefixtures("nothing_stored")
def test_a_body_beyond_1_mib_is_refused_whether_its_length_is_declared_or_not(client: httpx.Client) -> None:
    body = padded(MAX_BODY_BYTES + 1)
    expect(client.post("/v1/runs", content=body, headers=JSON), 413, "body-too-large")
    expect(client.post("/v1/runs", content=in_chunks(body), headers=JSON), 413, "body-too-large")
    expect(client.post("/v1/runs", content=in_chunks(body * 5), headers=JSON), 413, "body-too-large")


def test_a_body_of_exactly_1_mib_is_read(client: httpx.Client) -> None:
    body = padded(MAX_BODY_BYTES)
    assert client.post("/v1/runs", content=body, headers=JSON).status_code == 202
    assert client.post("/v1/runs", content=in_chunks(body), headers=JSON).status_code == 202


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize("declared", [10, 10_000])
def test_a_length_that_lies_stores_nothing(stack: Stack, client: httpx.Client, declared: int) -> None:
    """Shorter than the body: the rest is no request. Longer: the client is gone before the body is complete."""
    address = urlsplit(stack.api.address)
    head = (
        f"POST /v1/runs HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: {client.headers['authorization']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {declared}\r\n\r\n"
    )
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port or 80), timeout=10) as connection:
        connection.sendall(head.encode() + run_with())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65_536)
    assert b" 202 " not in answer
    assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9", "tab\there", "two\u00a0words"])
@pytest.mark.usefixtures("nothing_stored")
def test_a_bad_idempotency_key_is_refused(client: httpx.Client, key: str) -> None:
    headers = raw({**JSON, "Idempotency-Key": key})
    answer = expect(client.post("/v1/runs", content=run_with(), headers=headers), 422, "invalid-request")
    assert pointers(answer) == ["header/idempotency-key"]


def test_an_idempotency_key_of_another_request_is_refused(client: httpx.Client) -> None:
    headers = {**JSON, "Idempotency-Key": "order 17"}
    assert client.post("/v1/runs", content=run_with(), headers=headers).status_code == 202
    other = client.post("/v1/runs", content=run_with(input="something else"), headers=headers)
    expect(other, 422, "idempotency-mismatch")
    assert len(client.get("/v1/runs").json()["data"]) == 1


# -- who asks


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Basic dXNlcjpwYXNz",
        "Bearer nonsense",
        "Bearer ask_",
        "Bearer ask__",
        "Bearer ask_abc_",
        "Bearer ask_' OR 1=1_x",
        "Bearer ask_0123456789ab_" + "x" * 43,
        "Bearer " + "x" * 10_000,
        "Bearer ask_0123456789ab_\u00ff",
    ],
)
def test_without_a_valid_key_nothing_is_told(stack: Stack, authorization: str | None) -> None:
    headers = raw({} if authorization is None else {"Authorization": authorization})
    run = f"/v1/runs/{uuid4()}"
    with httpx.Client(base_url=stack.api.address, headers=headers, trust_env=False) as stranger:
        for method, path in [
            ("GET", "/v1/runs"),
            ("POST", "/v1/runs"),
            ("GET", run),
            ("GET", f"{run}/steps"),
            ("GET", f"{run}/audit"),
            ("POST", f"{run}/cancel"),
            ("GET", "/v1/agents"),
            ("GET", "/v1/reviews"),
            ("GET", f"/v1/reviews/{uuid4()}"),
            ("POST", f"/v1/reviews/{uuid4()}/decision"),
            ("GET", "/v1/runs/malformed"),
        ]:
            response = stranger.request(method, path)
            expect(response, 401, "unauthorized")
            assert response.headers["www-authenticate"].startswith('Bearer realm="agent-service"')


def test_a_stranger_s_body_is_not_even_parsed(stack: Stack) -> None:
    response = httpx.post(f"{stack.api.address}/v1/runs", content=b"[" * 100_000, headers=JSON, trust_env=False)
    expect(response, 401, "unauthorized")


async def _change_keys(database_url: str, tenant: str) -> tuple[str, str]:
    """An expired and a revoked key."""
    engine = make_engine(database_url, pool_size=1, application_name="test")
    async with engine.connect() as connection:
        past = datetime.now(UTC) - timedelta(seconds=1)
        every = frozenset(Scope)
        expired = await keys.create(connection, tenant=tenant, name="old", scopes=every, expires_at=past)
        revoked = await keys.create(connection, tenant=tenant, name="leaked", scopes=every, expires_at=None)
        assert await keys.revoke(connection, revoked.split("_")[1])
    await engine.dispose()
    return expired, revoked


def test_an_expired_and_a_revoked_key_are_refused(stack: Stack, tenant: str) -> None:
    for key in asyncio.run(_change_keys(stack.database_url, tenant)):
        with client_of(stack.api, key) as client:
            expect(client.get("/v1/runs"), 401, "unauthorized")


def test_a_key_is_refused_from_the_moment_it_is_revoked(stack: Stack, tenant: str) -> None:
    key = make_key(stack.database_url, tenant=tenant, name="soon revoked")

    async def revoke() -> None:
        engine = make_engine(stack.database_url, pool_size=1, application_name="test")
        async with engine.connect() as connection:
            await keys.revoke(connection, key.split("_")[1])
        await engine.dispose()

    with client_of(stack.api, key) as client:
        assert client.get("/v1/runs").status_code == 200
        asyncio.run(revoke())
        expect(client.get("/v1/runs"), 401, "unauthorized")


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("POST", "/v1/runs", Scope.RUNS_WRITE),
        ("POST", "/v1/runs/{id}/cancel", Scope.RUNS_WRITE),
        ("GET", "/v1/runs", Scope.RUNS_READ),
        ("GET", "/v1/runs/{id}", Scope.RUNS_READ),
        ("GET", "/v1/runs/{id}/steps", Scope.RUNS_READ),
        ("GET", "/v1/agents", Scope.RUNS_READ),
        ("GET", "/v1/runs/{id}/audit", Scope.AUDIT_READ),
        ("GET", "/v1/scaling", Scope.SCALING_READ),
        ("GET", "/v1/reviews", Scope.REVIEWS_READ),
        ("GET", "/v1/reviews/{id}", Scope.REVIEWS_READ),
        ("POST", "/v1/reviews/{id}/decision", Scope.REVIEWS_DECIDE),
    ],
)
def test_a_key_without_the_scope_is_refused(stack: Stack, tenant: str, method: str, path: str, scope: Scope) -> None:
    enough = {scope, Scope.ADMIN} | ({Scope.REVIEWS_ESCALATED} if scope is Scope.REVIEWS_DECIDE else set())
    others = [other for other in Scope if other not in enough]
    key = make_key(stack.database_url, tenant=tenant, name="narrow", scopes=others)
    with client_of(stack.api, key) as client:
        response = client.request(method, path.format(id=uuid4()))
    answer = expect(response, 403, "missing-scope")
    assert scope.value in answer["detail"]
    assert f'scope="{scope.value}"' in response.headers["www-authenticate"]


def test_the_scope_admin_is_enough(stack: Stack, tenant: str) -> None:
    key = make_key(stack.database_url, tenant=tenant, name="admin", scopes=[Scope.ADMIN])
    with client_of(stack.api, key) as client:
        assert client.get("/v1/runs").status_code == 200


def test_another_tenant_s_run_is_as_good_as_missing(stack: Stack, client: httpx.Client) -> None:
    run_id = submit(client, "toolbox", "script:unknown")["id"]
    key = make_key(stack.database_url, tenant="somebody-else", name="test")
    with client_of(stack.api, key) as stranger:
        for method, path in [
            ("GET", ""),
            ("GET", "/steps"),
            ("GET", "/audit"),
            ("POST", "/cancel"),
            ("GET", "?wait=1"),
        ]:
            foreign, missing, malformed = (
                expect(stranger.request(method, f"/v1/runs/{name}{path}"), 404, "not-found")
                for name in (run_id, uuid4(), "malformed")
            )
            assert foreign["detail"] == missing["detail"]
            assert foreign["title"] == missing["title"] == malformed["title"]
        assert stranger.get("/v1/runs").json()["data"] == []
    assert client.get(f"/v1/runs/{run_id}").json()["status"] != "cancelled"


# -- addresses and parameters


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("/v1/runs?limit=0", "query/limit"),
        ("/v1/runs?limit=101", "query/limit"),
        ("/v1/runs?limit=ten", "query/limit"),
        ("/v1/runs?limit=99999999999999999999999", "query/limit"),
        ("/v1/runs?status=done", "query/status"),
        ("/v1/runs?status=%00", "query/status"),
        ("/v1/runs?agent=%00", "query/agent"),
        ("/v1/runs?agent=a%20b", "query/agent"),
        ("/v1/runs?agent=%ff", "query/agent"),
        ("/v1/runs?agent=%ed%a0%80", "query/agent"),
        ("/v1/runs?statuss=failed", "query/statuss"),
        ("/v1/runs?cursor=", "query/cursor"),
        ("/v1/runs?cursor=nonsense", "query/cursor"),
        ("/v1/runs?cursor=%00", "query/cursor"),
        ("/v1/runs?cursor=AAAAAQ", "query/cursor"),
        ("/v1/runs?cursor=AAAAAAAAAAAAAAAAAAAAA%3D", "query/cursor"),
        ("/v1/runs?cursor=AAAAAAAAAAAAAAAAAAAA%C3%A9A", "query/cursor"),
        ("/v1/runs?cursor=" + "A" * 5_000, "query/cursor"),
        ("/v1/runs/{id}?wait=-1", "query/wait"),
        ("/v1/runs/{id}?wait=61", "query/wait"),
        ("/v1/runs/{id}?wait=nan", "query/wait"),
        ("/v1/runs/{id}?wait=inf", "query/wait"),
        ("/v1/runs/{id}?wait=soon", "query/wait"),
        ("/v1/runs/{id}/steps?cursor=AAAAAAAAAAAAAAAAAAAAAA", "query/cursor"),
        ("/v1/runs/{id}/audit?cursor=%F0%9F%98%80", "query/cursor"),
        ("/v1/runs/{id}/audit?limit=-5", "query/limit"),
        ("/v1/reviews?status=open", "query/status"),
        ("/v1/reviews?cursor=x", "query/cursor"),
    ],
)
def test_a_bad_parameter_is_refused(client: httpx.Client, path: str, where: str) -> None:
    answer = expect(client.get(path.format(id=uuid4())), 422, "invalid-request")
    assert pointers(answer) == [where]


def test_the_last_cursor_there_could_be_gives_an_empty_page(client: httpx.Client) -> None:
    run_id = submit(client, "toolbox", "script:unknown")["id"]
    for path in ("steps", "audit"):
        page = client.get(f"/v1/runs/{run_id}/{path}", params={"cursor": "_____w"}).json()
        assert page == {"data": [], "next_cursor": None}


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/runs/",
        "/v1/nothing",
        "/v1/runs/%00",
        "/v1/runs/%ff",
        "/v1/runs/a%2Fb",
        "/v1/reviews/1",
        "/docs",
    ],
)
def test_an_address_where_nothing_is(client: httpx.Client, path: str) -> None:
    expect(client.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/runs", {"GET", "POST"}),
        ("PUT", "/v1/runs/x", {"GET"}),
        ("GET", "/v1/runs/x/cancel", {"POST"}),
        ("POST", "/health/live", {"GET"}),
        ("TRACE", "/v1/agents", {"GET"}),
        ("POST", "/openapi.json", {"GET"}),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(client: httpx.Client, method: str, path: str, allowed: set[str]) -> None:
    response = client.request(method, path)
    expect(response, 405, "method-not-allowed")
    assert set(response.headers["allow"].split(", ")) >= allowed


def test_a_request_id_is_kept_when_it_is_harmless_and_replaced_when_it_is_not(client: httpx.Client) -> None:
    assert client.get("/v1/nothing", headers={"X-Request-Id": "a-1._Z"}).headers["x-request-id"] == "a-1._Z"
    for bad in ("", "a b", "x" * 65, 'a"b', "\u00e4"):
        answer = client.get("/v1/nothing", headers=raw({"X-Request-Id": bad}))
        assert answer.headers["x-request-id"] not in ("", bad)
        assert answer.json()["request_id"] == answer.headers["x-request-id"]


# -- what is not the caller's fault


def test_a_bug_is_answered_without_a_word_about_it(start_api: StartApi, own_key: str) -> None:
    api = start_api(AGENTS="tests.api.flawed_agents")
    with client_of(api, own_key) as client:
        response = client.post("/v1/runs", json={"agent": "explosive", "input": {"fuse": 1}})
        answer = expect(response, 500, "internal-error")
        assert "an internal detail" not in response.text
        assert client.get("/v1/runs").json()["data"] == []
    logged = [json.loads(line) for line in api.log.read_text().splitlines()]
    error = next(line for line in logged if line["level"] == "error")
    assert error["request_id"] == answer["request_id"]
    assert "an internal detail" in error["exception"]


def test_what_the_agent_s_own_model_makes_of_the_input_is_checked_too(start_api: StartApi, own_key: str) -> None:
    api = start_api(AGENTS="tests.api.flawed_agents")
    with client_of(api, own_key) as client:
        response = client.post("/v1/runs", json={"agent": "measuring", "input": {"value": "nan"}})
        assert pointers(expect(response, 422, "invalid-request")) == ["#/input/value"]
        assert client.post("/v1/runs", json={"agent": "measuring", "input": {"value": 1e308}}).status_code == 202
        big = int("9" * MAX_DIGITS)
        assert client.post("/v1/runs", json={"agent": "measuring", "input": {"value": big}}).status_code == 422


def test_without_its_database_the_api_says_so_and_recovers(
    stack: Stack, start_api: StartApi, own_key: str, database_url: str
) -> None:
    """The database's connections are cut and new ones refused, as in a restart of Postgres."""
    api = start_api()
    name = urlsplit(database_url).path.removeprefix("/")

    async def let_in(yes: bool) -> None:
        engine = make_engine(stack.postgres.url(), pool_size=1, application_name="test")
        async with engine.connect() as connection:
            await connection.execute(text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS {yes}'))
            cut = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
            await connection.execute(cut, {"name": name})
        await engine.dispose()

    with client_of(api, own_key) as client:
        assert client.get("/v1/runs").status_code == 200
        asyncio.run(let_in(True))  # cut only: nobody notices
        assert client.get("/v1/runs").status_code == 200
        asyncio.run(let_in(False))
        for response in (client.get("/v1/runs"), client.post("/v1/runs", json={"agent": "support", "input": "x"})):
            expect(response, 503, "unavailable")
            assert int(response.headers["retry-after"]) >= 1
        expect(client.get("/health/ready"), 503, "unavailable")
        assert client.get("/health/live").status_code == 200
        health = client.get("/health").json()
        assert health["status"] == "unavailable"
        assert health["parts"]["postgres"]["status"] == "away"
        asyncio.run(let_in(True))
        assert client.get("/v1/runs").status_code == 200
        assert client.get("/health/ready").json()["status"] == "ok"


# -- the start


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"DATABASE_URL": ""}, "DATABASE_URL is missing"),
        ({"DATABASE_URL": "mysql://user:hunter2@host/name"}, "DATABASE_URL is malformed"),
        ({"REDIS_URL": "http://host"}, "REDIS_URL is malformed"),
        ({"API_PORT": "seventy"}, "API_PORT is malformed"),
        ({"ENVIRONMENT": "holiday"}, "ENVIRONMENT is malformed"),
        ({"AGENTS": "no.such.package"}, "AGENTS: cannot import no.such.package"),
    ],
)
def test_a_wrong_environment_variable_stops_the_start_with_one_line_that_names_it(
    wrong: dict[str, str], said: str
) -> None:
    good = {"DATABASE_URL": "postgresql://u:p@127.0.0.1:1/n", "REDIS_URL": "redis://127.0.0.1:1/0"}
    command = [sys.executable, "-m", "app", "api"]
    ended = subprocess.run(
        command, check=False, env=clean_env(**(good | wrong)), capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert said in ended.stderr
    assert "hunter2" not in ended.stderr


def test_what_is_not_http_is_answered_with_a_problem(stack: Stack) -> None:
    with socket.create_connection(("127.0.0.1", stack.api.port), timeout=5) as connection:
        connection.sendall(b"NONSENSE\x01 / HTTP/1.1\r\n\r\n")
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/problem+json" in head
    assert json.loads(body)["type"] == "urn:agent-service:problem:bad-request"


def test_an_unknown_parameter_of_a_poll_is_named(client: httpx.Client) -> None:
    response = client.get(f"/v1/runs/{uuid4()}", params={"waits": 30})
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "query/waits"


def test_what_is_wrong_is_said_without_names_of_ours(client: httpx.Client) -> None:
    cases = [
        ({"agent": "toolbox", "input": "x", "limits": None}, "#/limits", "must be an object"),
        ({"agent": "toolbox", "input": "  "}, "#/input", "must hold some text"),
    ]
    for body, pointer, detail in cases:
        [error] = client.post("/v1/runs", json=body).json()["errors"]
        assert error == {"pointer": pointer, "detail": detail}
    [error] = client.get("/v1/runs", params={"cursor": "abc"}).json()["errors"]
    assert error["detail"] == "is not a cursor of this list"
