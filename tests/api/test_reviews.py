"""Reviews through the API: read, decide, once. What the worker does with a decision is in `tests/worker`."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app.devstack.access import make_key
from tests.api.conftest import client_of
from tests.scripts import DONE, Run, Script, audit_of, call, calls, rest, submit
from tests.stack import Stack

Json = dict[str, Any]


@pytest.fixture
def script(stack: Stack) -> Script:
    return Script(stack.model_url, [call("open_the_door"), DONE])


@pytest.fixture
def run(client: httpx.Client, script: Script) -> Run:
    """A run that waits for a person."""
    run = rest(client, submit(client, "toolbox", script.input))
    assert run["status"] == "waiting"
    return run


@pytest.fixture
def review(client: httpx.Client, run: Run) -> Json:
    (review,) = client.get("/v1/reviews", params={"status": "pending"}).json()["data"]
    assert review["run_id"] == run["id"]
    found: Json = client.get(f"/v1/reviews/{review['id']}").json()
    assert found == review
    return found


def decide(client: httpx.Client, review: Json, decision: str, **more: Any) -> httpx.Response:
    body = {"decision": decision, "args_hash": review["args_hash"], **more}
    return client.post(f"/v1/reviews/{review['id']}/decision", json=body)


def refused(response: httpx.Response, status: int, problem: str) -> Json:
    assert response.status_code == status, response.text
    body: Json = response.json()
    assert body["type"] == f"urn:agent-service:problem:{problem}"
    return body


def test_a_review_shows_what_is_to_be_decided(review: Json, run: Run) -> None:
    assert (review["kind"], review["tool"], review["arguments"]) == ("approval", "open_the_door", {})
    assert (review["status"], review["decision"], review["decided_by"]) == ("pending", None, None)
    assert review["seq"] == 1
    assert review["expires_at"] > review["created_at"]


def test_an_approved_call_is_made(client: httpx.Client, run: Run, review: Json) -> None:
    decided = decide(client, review, "approve", reason="it is me").json()
    assert (decided["status"], decided["decision"], decided["reason"]) == ("decided", "approve", "it is me")
    assert decided["decided_by"].startswith("key:")
    assert rest(client, run)["status"] == "succeeded"
    kinds = audit_of(client, run)
    assert kinds[kinds.index("review.decided") :][:3] == ["review.decided", "run.requeued", "run.claimed"]
    assert client.get("/v1/reviews", params={"status": "pending"}).json()["data"] == []


def test_a_rejection_is_told_to_the_model(client: httpx.Client, script: Script, run: Run, review: Json) -> None:
    assert decide(client, review, "reject", reason="it is night").status_code == 200
    assert rest(client, run)["status"] == "succeeded"
    assert "it is night" in script.requests()[-1]["messages"][-1]["content"]


def test_a_rejection_may_end_the_run(client: httpx.Client, script: Script, run: Run, review: Json) -> None:
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(client.get, f"/v1/runs/{run['id']}", params={"wait": 20})
        assert decide(client, review, "reject", reason="no way", end_run=True).status_code == 200
        waiting.result()
    ended = client.get(f"/v1/runs/{run['id']}").json()
    assert (ended["status"], ended["stop_reason"], ended["error"]) == ("failed", "rejected", "no way")
    assert len(script.requests()) == 1


def test_a_review_is_decided_once(client: httpx.Client, run: Run, review: Json) -> None:
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda _: decide(client, review, "approve"), range(6)))
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409, 409, 409]
    for answer in answers:
        if answer.status_code == 409:
            refused(answer, 409, "review-decided")
    refused(decide(client, review, "reject"), 409, "review-decided")
    assert audit_of(client, rest(client, run)).count("review.decided") == 1


def test_a_decision_on_other_arguments_does_not_count(client: httpx.Client, run: Run, review: Json) -> None:
    refused(decide(client, {**review, "args_hash": "0" * 64}, "approve"), 409, "arguments-changed")
    assert client.get(f"/v1/reviews/{review['id']}").json()["status"] == "pending"
    assert client.get(f"/v1/runs/{run['id']}").json()["status"] == "waiting"


def test_a_decision_that_comes_too_late_does_not_count(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [call("open_the_door"), DONE])
    run = rest(client, submit(client, "impatient", script.input))  # its reviews expire after half a second
    (review,) = client.get("/v1/reviews").json()["data"]
    stack.until(lambda: client.get(f"/v1/runs/{run['id']}").json()["status"] == "failed")
    refused(decide(client, review, "approve"), 409, "review-expired")
    assert client.get(f"/v1/runs/{run['id']}").json()["stop_reason"] == "review_expired"


def test_a_cancelled_run_leaves_nothing_to_decide(client: httpx.Client, run: Run, review: Json) -> None:
    assert client.post(f"/v1/runs/{run['id']}/cancel").status_code == 202
    assert client.get(f"/v1/reviews/{review['id']}").json()["status"] == "void"
    refused(decide(client, review, "approve"), 409, "conflict")


def test_a_run_goes_on_when_all_its_reviews_are_decided(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [calls(("open_the_door", {}), ("pay", {"amount": 60})), DONE])
    run = rest(client, submit(client, "toolbox", script.input))
    first, second = client.get("/v1/reviews").json()["data"]
    assert first["id"] > second["id"]
    assert decide(client, first, "approve").status_code == 200
    assert client.get(f"/v1/runs/{run['id']}").json()["status"] == "waiting"
    assert decide(client, second, "reject").status_code == 200
    assert rest(client, run)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"decision": "maybe"}, "#/decision"),
        ({"decision": "respond", "response": "it was open"}, "#/decision"),
        ({"response": "it was open"}, "#/response"),
        ({"end_run": True}, "#/end_run"),
        ({"args_hash": "short"}, "#/args_hash"),
        ({"args_hash": None}, "#/args_hash"),
        ({"reason": "x" * 2_001}, "#/reason"),
        ({"reason": "nul \0"}, "#/reason"),
        ({"end_run": "yes"}, "#/end_run"),
        ({"edit": {}}, "#/edit"),
    ],
)
def test_a_decision_that_makes_no_sense_is_refused(
    client: httpx.Client, review: Json, change: Json, where: str
) -> None:
    response = decide(client, review, **{"decision": "approve", **change})
    answer = refused(response, 422, "invalid-request")
    assert [error["pointer"] for error in answer["errors"]] == [where]
    assert client.get(f"/v1/reviews/{review['id']}").json()["status"] == "pending"


def test_another_tenant_s_review_is_as_good_as_missing(stack: Stack, review: Json) -> None:
    key = make_key(stack.database_url, tenant=f"other-{uuid4().hex}", name="test")
    with client_of(stack.api, key) as stranger:
        for review_id in (review["id"], str(uuid4())):
            answer = refused(stranger.get(f"/v1/reviews/{review_id}"), 404, "not-found")
            assert answer["detail"] == "no such review"
            refused(decide(stranger, {**review, "id": review_id}, "approve"), 404, "not-found")
        assert stranger.get("/v1/reviews").json()["data"] == []


def test_reviews_are_paged_newest_first(stack: Stack, client: httpx.Client) -> None:
    for _ in range(3):
        rest(client, submit(client, "toolbox", Script(stack.model_url, [call("open_the_door"), DONE]).input))
    first = client.get("/v1/reviews", params={"limit": 2}).json()
    second = client.get("/v1/reviews", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    ids = [review["id"] for review in first["data"] + second["data"]]
    assert len(ids) == 3
    assert ids == sorted(ids, reverse=True)
    assert second["next_cursor"] is None
