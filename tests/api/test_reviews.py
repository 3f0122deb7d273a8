"""Reviews through the API: read, decide, once. What the worker does with a decision is in `tests/worker`."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.devstack.access import id_of, make_key, replace_key
from app.domain.agent import OnExpiry
from app.domain.principal import Scope
from app.domain.review import ReviewKind
from app.domain.run import StopReason
from app.domain.step import ModelStep
from tests.api.conftest import client_of
from tests.scripts import DONE, Run, Script, audit_of, call, calls, events_of, rest, submit
from tests.stack import Stack
from tests.waiting import limit_request, put_to_wait, request, rules

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
    assert {name: found[name] for name in review} == review
    return found


def decide(client: httpx.Client, review: Json, decision: str, **more: Any) -> httpx.Response:
    body = {"decision": decision, "args_hash": review["args_hash"], **more}
    return client.post(f"/v1/reviews/{review['id']}/decision", json=body)


def recorded(client: httpx.Client, review: Json, kind: str) -> list[Json]:
    return [event for event in events_of(client, review["run_id"]) if event["kind"] == kind]


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
        ({"decision": "edit"}, "#/arguments"),
        ({"arguments": {}}, "#/arguments"),
        ({"decision": "edit", "arguments": ["a list"]}, "#/arguments"),
        ({"decision": "reject", "response": "never the way to deny"}, "#/response"),
        ({"decision": "respond", "response": ""}, "#/response"),
        ({"decision": "respond", "response": " \n"}, "#/response"),
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


# -- which are listed


def test_reviews_can_be_narrowed_and_a_misspelt_filter_is_refused(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    first = put_to_wait(stack.database_url, tenant=tenant, agent="toolbox")
    second = put_to_wait(stack.database_url, limit_request(), tenant=tenant, agent="typed")

    def listed(**params: str | float) -> list[str]:
        answer = client.get("/v1/reviews", params=params)
        assert answer.status_code == 200, answer.text
        return [review["run_id"] for review in answer.json()["data"]]

    assert listed() == [str(second), str(first)]
    assert listed(agent="toolbox") == listed(kind="approval") == [str(first)]
    assert listed(agent="typed", status="pending", kind="limit", queue="first", newer_than=60) == [str(second)]
    assert listed(queue="second") == listed(older_than=60) == listed(newer_than=0) == []
    for wrong in ({"kind": "maybe"}, {"older_than": -1}, {"newer_than": "soon"}, {"age": 1}, {"older_than": 1e30}):
        answer = refused(client.get("/v1/reviews", params=wrong), 422, "invalid-request")
        assert [error["pointer"] for error in answer["errors"]] == [f"query/{next(iter(wrong))}"]


# -- what is shown


def shown(client: httpx.Client, run_id: UUID) -> Json:
    """The review of a run, in detail."""
    pending = client.get("/v1/reviews", params={"status": "pending"}).json()["data"]
    (review,) = (review for review in pending if review["run_id"] == str(run_id))
    detail: Json = client.get(f"/v1/reviews/{review['id']}").json()
    assert set(review) < set(detail)
    return detail


def effects(review: Json) -> dict[str, str]:
    return {possible["decision"]: possible["effect"] for possible in review["decisions"]}


def test_a_person_sees_what_the_run_was_asked_what_it_did_and_what_each_decision_will_do(
    stack: Stack, client: httpx.Client
) -> None:
    script = Script(stack.model_url, [call("echo", {"text": "first"}), call("pay", {"amount": 60}), DONE])
    run = rest(client, submit(client, "toolbox", script.input))
    review = shown(client, UUID(run["id"]))
    assert review["run_input"] == script.input
    assert [step["kind"] for step in review["steps"]] == ["model", "tool", "model"]
    assert review["steps"][1]["result"] == "first"
    assert review["tool_description"] == "Pay; above 50 a person has to agree."
    assert (review["queue"], review["barred"], review["worker"], review["edited"]) == ("first", [], None, None)
    assert effects(review) == {
        "approve": "pay is called with exactly these arguments, and the run goes on.",
        "edit": "pay is called with your arguments in place of these, the model is told so, and the run goes on. "
        "If they need approval too, a new review asks for it.",
        "reject": "pay is not called, the model is told your reason, and the run goes on. "
        "With end_run the run ends instead, as rejected.",
    }
    decide(client, review, "reject")
    assert client.get(f"/v1/reviews/{review['id']}").json()["decisions"] == []


def test_only_the_newest_steps_are_shown_the_oldest_first(stack: Stack, client: httpx.Client, tenant: str) -> None:
    steps = [ModelStep(seq=seq, attempt=1, model="m", content=str(seq)) for seq in range(130)]
    review = shown(client, put_to_wait(stack.database_url, request(seq=130), steps=steps, tenant=tenant))
    assert [step["seq"] for step in review["steps"]] == list(range(30, 130))


def test_of_a_call_in_doubt_the_worker_that_made_it_is_named(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [call("charge_and_crash", {"amount": 1}), DONE])
    review = shown(client, UUID(rest(client, submit(client, "toolbox", script.input))["id"]))
    assert review["kind"] == "in_doubt"
    assert str(stack.worker.pid) in review["worker"]
    said = effects(review)
    assert list(said) == ["approve", "reject", "respond"]
    for decision in ("approve", "reject"):
        assert f"Be sure that worker {review['worker']}, which made the call, is gone" in said[decision]
    assert said["respond"].startswith("It happened: charge_and_crash is not called again")


def test_of_several_open_reviews_each_says_that_the_run_waits_for_the_others(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    put_to_wait(stack.database_url, request(seq=1), request(seq=2), tenant=tenant)
    for review in client.get("/v1/reviews").json()["data"]:
        detail = client.get(f"/v1/reviews/{review['id']}").json()
        assert "the run goes on once its other open review is decided" in effects(detail)["approve"]


def test_of_a_question_and_of_a_limit_a_person_sees_what_an_answer_does(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    asked = request(ReviewKind.QUESTION, tool="ask_human", arguments={"question": "Which one?"})
    question = shown(client, put_to_wait(stack.database_url, asked, tenant=tenant))
    assert list(effects(question)) == ["reject", "respond"]
    assert effects(question)["respond"] == "The model is given your response as the answer, and the run goes on."
    limit = shown(client, put_to_wait(stack.database_url, limit_request(), tenant=tenant, agent="typed"))
    assert (limit["seq"], limit["tool"], limit["stop_reason"]) == (None, None, "max_steps")
    assert effects(limit) == {
        "approve": "max_steps is raised from 4 to 8, and the run goes on.",
        "edit": "max_steps is raised from 4 to the value that you give, and the run goes on.",
        "reject": "The run ends as failed, with the stop reason max_steps.",
        "respond": "The run ends as succeeded, with your response as its output, "
        "JSON that fits what agent typed answers.",
    }


# -- other arguments


def test_other_arguments_are_stored_beside_those_proposed(stack: Stack, client: httpx.Client, tenant: str) -> None:
    review = shown(client, put_to_wait(stack.database_url, tenant=tenant))
    decided = decide(client, review, "edit", arguments={"amount": 40}, reason="too much").json()
    assert (decided["decision"], decided["status"], decided["edited"]) == ("edit", "decided", {"amount": 40})
    assert (decided["arguments"], decided["reason"]) == ({"amount": 60}, "too much")
    (event,) = recorded(client, review, "review.decided")
    assert event["data"] == {"id": review["id"], "decision": "edit"}
    written = {"arguments": {"amount": 40}, "reason": "too much", "response": None}
    assert event["payload"] == {"args_hash": review["args_hash"], **written}
    assert event["actor"] == decided["decided_by"]


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"amount": "many"}, "#/arguments/amount"),
        ({}, "#/arguments/amount"),
        ({"amount": 1, "currency": "EUR"}, "#/arguments/currency"),
        ({"amount": None}, "#/arguments/amount"),
    ],
)
def test_other_arguments_must_fit_the_tool(
    stack: Stack, client: httpx.Client, tenant: str, arguments: Json, where: str
) -> None:
    review = shown(client, put_to_wait(stack.database_url, tenant=tenant))
    answer = refused(decide(client, review, "edit", arguments=arguments), 422, "invalid-request")
    assert [error["pointer"] for error in answer["errors"]] == [where]
    assert shown(client, UUID(review["run_id"]))["status"] == "pending"


def test_other_arguments_that_become_what_postgres_refuses_are_refused(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    asked = request(tool="rest", arguments={"seconds": 1.0})
    review = shown(client, put_to_wait(stack.database_url, asked, tenant=tenant))
    answer = refused(decide(client, review, "edit", arguments={"seconds": "NaN"}), 422, "invalid-request")
    assert answer["errors"] == [{"pointer": "#/arguments/seconds", "detail": "is not a finite number"}]


def test_a_call_of_an_agent_that_is_gone_is_approved_or_rejected_but_not_edited(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    for gone in ({"agent": "gone"}, {"tool": "gone"}):
        asked = request(tool=gone.get("tool", "pay"))
        run_id = put_to_wait(stack.database_url, asked, tenant=tenant, agent=gone.get("agent", "toolbox"))
        review = shown(client, run_id)
        assert (list(effects(review)), review["tool_description"]) == (["approve", "reject"], None)
        answer = refused(decide(client, review, "edit", arguments={"amount": 1}), 422, "invalid-request")
        assert "does not know" in answer["detail"]
        assert decide(client, review, "reject", end_run=True).status_code == 200


# -- limits


def limits_of(client: httpx.Client, review: Json) -> Json:
    found: Json = client.get(f"/v1/runs/{review['run_id']}").json()["limits"]
    return found


@pytest.mark.parametrize(
    ("decision", "more", "raised"), [("approve", {}, 8), ("edit", {"arguments": {"max_steps": 5}}, 5)]
)
def test_a_limit_is_raised_and_the_run_goes_on(
    *, stack: Stack, client: httpx.Client, tenant: str, decision: str, more: Json, raised: int
) -> None:
    script = Script(stack.model_url, [DONE])
    run_id = put_to_wait(stack.database_url, limit_request(), tenant=tenant, run_input=script.input)
    review = shown(client, run_id)
    before = limits_of(client, review)
    assert decide(client, review, decision, **more).status_code == 200
    assert limits_of(client, review) == {**before, "max_steps": raised}
    (event,) = recorded(client, review, "review.decided")
    assert event["data"]["limits"] == {"max_steps": raised}
    run = rest(client, {"id": str(run_id)})
    assert (run["status"], run["stop_reason"]) == ("succeeded", "final_answer")
    kinds = audit_of(client, run)
    assert kinds[kinds.index("review.decided") :][:3] == ["review.decided", "run.requeued", "run.claimed"]


def test_a_cost_is_raised_by_a_number_as_people_write_it(stack: Stack, client: httpx.Client, tenant: str) -> None:
    asked = limit_request({"max_cost_usd": "1.00"}, StopReason.MAX_COST)
    review = shown(client, put_to_wait(stack.database_url, asked, tenant=tenant))
    assert decide(client, review, "edit", arguments={"max_cost_usd": 0.75}).status_code == 200
    assert limits_of(client, review)["max_cost_usd"] == 0.75


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"max_steps": 4}, "#/arguments/max_steps"),
        ({"max_steps": 3}, "#/arguments/max_steps"),
        ({"max_steps": 1_001}, "#/arguments/max_steps"),
        ({"max_steps": "9"}, "#/arguments/max_steps"),
        ({"max_steps": None}, "#/arguments/max_steps"),
        ({"max_tokens": 200_000, "max_steps": 9}, "#/arguments/max_tokens"),
        ({}, "#/arguments/max_steps"),
    ],
)
def test_a_limit_is_raised_to_something_greater_that_is_allowed_and_nothing_else_is(
    stack: Stack, client: httpx.Client, tenant: str, arguments: Json, where: str
) -> None:
    review = shown(client, put_to_wait(stack.database_url, limit_request(), tenant=tenant))
    before = limits_of(client, review)
    answer = refused(decide(client, review, "edit", arguments=arguments), 422, "invalid-request")
    assert [error["pointer"] for error in answer["errors"]] == [where]
    assert limits_of(client, review) == before
    assert shown(client, UUID(review["run_id"]))["status"] == "pending"


def test_a_limit_that_is_not_raised_ends_the_run_for_that_reason(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    asked = limit_request({"max_tokens": 1_000_000}, StopReason.MAX_TOKENS)
    review = shown(client, put_to_wait(stack.database_url, asked, tenant=tenant))
    assert decide(client, review, "reject", reason="enough").status_code == 200
    run = client.get(f"/v1/runs/{review['run_id']}").json()
    assert (run["status"], run["stop_reason"], run["error"]) == ("failed", "max_tokens", "enough")
    assert audit_of(client, run)[-2:] == ["review.decided", "run.failed"]


def test_a_person_may_answer_in_the_agents_place(stack: Stack, client: httpx.Client, tenant: str) -> None:
    text_run = put_to_wait(stack.database_url, limit_request(), tenant=tenant)
    assert decide(client, shown(client, text_run), "respond", response="It is 42.").status_code == 200
    run = client.get(f"/v1/runs/{text_run}").json()
    assert (run["status"], run["stop_reason"], run["output"]) == ("succeeded", "person_answered", "It is 42.")
    assert audit_of(client, run)[-2:] == ["review.decided", "run.succeeded"]

    typed_run = put_to_wait(stack.database_url, limit_request(), tenant=tenant, agent="typed")
    review = shown(client, typed_run)
    for wrong, what in (
        ("yes", "Invalid JSON"),
        ('{"verdict": "fine", "score": 11}', "/score: Input should be less than or equal to 10"),
        ('{"verdict": "a\\u0000b", "score": 1}', "PostgreSQL"),
    ):
        answer = refused(decide(client, review, "respond", response=wrong), 422, "invalid-request")
        (error,) = answer["errors"]
        assert error["pointer"] == "#/response"
        assert what in error["detail"]
    assert decide(client, review, "respond", response='{"verdict": "fine", "score": 9}').status_code == 200
    assert client.get(f"/v1/runs/{typed_run}").json()["output"] == {"verdict": "fine", "score": 9}


# -- who may decide


def reviewer(stack: Stack, tenant: str, *scopes: Scope) -> httpx.Client:
    return client_of(stack.api, make_key(stack.database_url, tenant=tenant, name="reviewer", scopes=scopes))


def test_whoever_submitted_a_run_does_not_decide_about_it_where_four_eyes_are_demanded(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    key = make_key(stack.database_url, tenant=tenant, name="submitter")  # it may do everything
    submitter, editor = key.split("_")[1], make_key(stack.database_url, tenant=tenant, name="editor")
    asked = request(editor=f"key:{editor.split('_')[1]}")
    run_id = put_to_wait(stack.database_url, asked, its=rules(four_eyes=True), submitter=submitter, tenant=tenant)
    review = shown(client, run_id)
    assert review["barred"] == [f"key:{submitter}", f"key:{editor.split('_')[1]}"]
    for barred in (key, editor):
        with client_of(stack.api, barred) as caller:
            for decision in ("approve", "reject"):
                refused(decide(caller, review, decision), 403, "four-eyes")
    assert "review.decided" not in audit_of(client, {"id": str(run_id)})
    assert decide(client, review, "approve").status_code == 200


@pytest.mark.parametrize("part", ["submitter", "editor"])
def test_a_new_key_does_not_make_somebody_else_of_its_holder(
    stack: Stack, client: httpx.Client, tenant: str, part: str
) -> None:
    old = make_key(stack.database_url, tenant=tenant, name=part)
    new = replace_key(stack.database_url, old)
    newest = replace_key(stack.database_url, new)
    for used in (old, new, newest):
        mine = {"submitter": id_of(used)} if part == "submitter" else {}
        asked = request(editor=f"key:{id_of(used)}" if part == "editor" else None)
        run_id = put_to_wait(stack.database_url, asked, its=rules(four_eyes=True), tenant=tenant, **mine)
        review = shown(client, run_id)
        for key in (old, new, newest):
            with client_of(stack.api, key) as holder:
                answer = refused(decide(holder, review, "approve"), 403, "four-eyes")
                assert answer["detail"].startswith("whoever holds this key submitted the run or edited the call")
        assert decide(client, review, "approve").status_code == 200


def test_where_four_eyes_are_not_demanded_a_holder_decides_with_either_key(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    old = make_key(stack.database_url, tenant=tenant, name="submitter")
    for key in (old, replace_key(stack.database_url, old)):
        review = shown(client, put_to_wait(stack.database_url, submitter=id_of(old), tenant=tenant))
        with client_of(stack.api, key) as holder:
            assert decide(holder, review, "approve").status_code == 200


def test_each_queue_is_decided_with_a_scope_of_its_own(stack: Stack, client: httpx.Client, tenant: str) -> None:
    its = rules(expires_s=4, on_expiry=OnExpiry.ESCALATE)
    with (
        reviewer(stack, tenant, Scope.REVIEWS_DECIDE) as first,
        reviewer(stack, tenant, Scope.REVIEWS_ESCALATED) as second,
        reviewer(stack, tenant, Scope.ADMIN) as admin,
    ):
        plain = shown(client, put_to_wait(stack.database_url, tenant=tenant))
        answer = decide(second, plain, "approve")
        assert "reviews:decide" in refused(answer, 403, "missing-scope")["detail"]
        assert 'scope="reviews:decide"' in answer.headers["WWW-Authenticate"]
        assert decide(first, plain, "approve").status_code == 200

        waiting = [put_to_wait(stack.database_url, its=its, tenant=tenant) for _ in range(2)]
        for decider, run_id in zip((second, admin), waiting, strict=True):
            while (escalated := shown(client, run_id))["queue"] == "first":
                stack.pause()
            assert escalated["status"] == "pending"
            answer = decide(first, escalated, "approve")
            assert "reviews:escalated" in refused(answer, 403, "missing-scope")["detail"]
            assert decide(decider, escalated, "approve").status_code == 200
