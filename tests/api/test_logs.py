"""One line of JSON an event, under the ids by which it is looked for; and problem documents have the same ids."""

import json
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.devstack.access import make_key
from app.domain.ids import new_id
from tests.api.conftest import StartApi, client_of
from tests.scripts import DONE, Script, call, rest, submit
from tests.stack import Stack

Json = dict[str, Any]
CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{CALLER}-00f067aa0ba902b7-01"


def ids_in(document: Json) -> Json:
    names = ("request_id", "run_id", "trace_id", "caller_trace_id", "tenant", "attempt")
    return {name: document[name] for name in names if name in document}


def lines_of(stack: Stack, process: str, **wanted: str) -> list[Json]:
    """The lines of a process that have these fields, as soon as there are some."""
    found: list[Json] = []

    def look() -> bool:
        text = getattr(stack, process).log.read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        found[:] = [line for line in lines if wanted.items() <= line.items()]
        return bool(found)

    Stack.until(look)
    return found


def of_run(run_id: str) -> Json:
    return {"run_id": run_id, "trace_id": UUID(run_id).hex}


def test_a_requests_lines_say_whose_it_is_and_which_run_it_is_about(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    run = submit(client, "support", "hello")
    asked = uuid4().hex
    answers = {
        "path": client.get(f"/v1/runs/{run['id']}/steps", headers={"X-Request-Id": f"{asked}-path"}),
        "short": client.get(
            f"/v1/runs/{run['id'].replace('-', '').upper()}", headers={"X-Request-Id": f"{asked}-short"}
        ),
        "list": client.get("/v1/runs", headers={"X-Request-Id": f"{asked}-list", "Traceparent": TRACEPARENT}),
        "submit": client.post(
            "/v1/runs",
            json={"agent": "support", "input": "x"},
            headers={"X-Request-Id": f"{asked}-submit", "Traceparent": TRACEPARENT},
        ),
        "odd": client.get("/v1/runs", headers={"X-Request-Id": f"{asked}-odd", "Traceparent": TRACEPARENT[:-1]}),
        "nobody": httpx.get(
            f"{stack.api.address}/v1/runs", headers={"X-Request-Id": f"{asked}-nobody"}, trust_env=False
        ),
    }
    accepted = answers["submit"].json()["id"]
    about: dict[str, Json] = {
        "path": {"tenant": tenant, **of_run(run["id"])},
        "short": {"tenant": tenant, **of_run(run["id"])},
        "list": {"tenant": tenant, "caller_trace_id": CALLER},
        "submit": {"tenant": tenant, "caller_trace_id": CALLER, **of_run(accepted)},
        "odd": {"tenant": tenant},
        "nobody": {},
    }
    for name, answer in answers.items():
        assert answer.headers["x-request-id"] == f"{asked}-{name}"
        (line,) = lines_of(stack, "api", request_id=f"{asked}-{name}", event="request")
        assert ids_in(line) == {"request_id": f"{asked}-{name}", **about[name]}
        assert line["status"] == answer.status_code


def test_every_line_of_a_worker_about_a_run_has_its_ids(stack: Stack, client: httpx.Client, tenant: str) -> None:
    script = Script(stack.model_url, [call("crash"), DONE])
    asked = uuid4().hex
    accepted = client.post(
        "/v1/runs", json={"agent": "toolbox", "input": script.input}, headers={"X-Request-Id": asked}
    ).json()
    rest(client, accepted)
    lines = lines_of(stack, "worker", run_id=accepted["id"])
    assert "tool crashed" in {line["event"] for line in lines}
    for line in lines:
        assert ids_in(line) == {"request_id": asked, "tenant": tenant, "attempt": 1, **of_run(accepted["id"])}
        assert line["worker"]


def test_a_problem_has_the_ids_of_the_log(stack: Stack, client: httpx.Client, tenant: str) -> None:
    run = submit(client, "support", "hello")
    rest(client, run)
    missing = str(new_id())
    problems = {
        run["id"]: client.post(f"/v1/runs/{run['id']}/cancel"),
        missing: client.get(f"/v1/runs/{missing}"),
        missing.upper(): client.get(f"/v1/runs/{missing.upper()}/nothing"),
    }
    assert [problem.status_code for problem in problems.values()] == [409, 404, 404]
    for run_id, answer in problems.items():
        problem = answer.json()
        assert ids_in(problem) == {"request_id": answer.headers["x-request-id"], **of_run(run_id.lower())}
        (line,) = lines_of(stack, "api", request_id=problem["request_id"], event="request")
        assert of_run(run_id.lower()).items() <= line.items()


@pytest.mark.parametrize("path", ["/v1/runs/nonsense", f"/v1/runs/{UUID(int=1)}0", "/v1/nothing", "/v1/runs?limit=0"])
def test_a_problem_that_is_about_no_run_names_none(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (404, 422)
    assert ids_in(answer.json()) == {"request_id": answer.headers["x-request-id"]}


def test_a_review_is_about_its_run_but_only_for_its_tenant(stack: Stack, client: httpx.Client, tenant: str) -> None:
    script = Script(stack.model_url, [call("open_the_door"), DONE])
    run = rest(client, submit(client, "toolbox", script.input))
    (review,) = client.get("/v1/reviews").json()["data"]
    read = client.get(f"/v1/reviews/{review['id']}")
    (line,) = lines_of(stack, "api", request_id=read.headers["x-request-id"])
    assert ids_in(line) == {"request_id": read.headers["x-request-id"], "tenant": tenant, **of_run(run["id"])}
    body = {"decision": "approve", "args_hash": "0" * 64}
    too_late = client.post(f"/v1/reviews/{review['id']}/decision", json=body)
    assert too_late.status_code == 409
    assert ids_in(too_late.json()) == {"request_id": too_late.headers["x-request-id"], **of_run(run["id"])}
    stranger = {"Authorization": f"Bearer {make_key(stack.database_url, tenant='stranger', name='s')}"}
    for answer in (
        client.get(f"/v1/reviews/{review['id']}", headers=stranger),
        client.post(f"/v1/reviews/{review['id']}/decision", json=body, headers=stranger),
    ):
        assert answer.status_code == 404
        assert ids_in(answer.json()) == {"request_id": answer.headers["x-request-id"]}


def test_what_patterns_name_is_in_no_line_and_a_request_id_that_would_not_be_is_not_kept(
    start_api: StartApi, own_key: str
) -> None:
    api = start_api(REDACT_PATTERNS=r'["own", "CUST-\\d+"]')
    with client_of(api, own_key) as client:
        for mine, kept in (("CUST-4711", True), ("4111111111111111", False), ("AKIAIOSFODNN7EXAMPLE", False)):
            answer = client.get("/v1/runs", headers={"X-Request-Id": mine})
            assert (answer.headers["x-request-id"] == mine) is kept
    lines = [json.loads(line) for line in api.log.read_text().splitlines()]
    (line,) = (line for line in lines if line.get("request_id") == "[redacted]")
    assert line["tenant"] == "[redacted]"
    assert "4111111111111111" not in api.log.read_text()
