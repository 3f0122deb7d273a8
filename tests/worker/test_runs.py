"""What a run does: tools, mistakes, faults of the provider, people, crashes. Through the API, on real servers."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest
import redis

from app.devstack.access import make_key
from app.domain.data import as_data
from tests.scripts import DONE, Run, Script, audit_of, call, calls, rest, say, steps_of, submit
from tests.stack import Stack


def play(stack: Stack, client: httpx.Client, replies: list[dict[str, Any]], **more: Any) -> tuple[Run, Script]:
    script = Script(stack.model_url, replies)
    return rest(client, submit(client, "toolbox", script.input, **more)), script


def results_seen_by_the_model(script: Script) -> list[str]:
    return [message["content"] for message in script.requests()[-1]["messages"] if message["role"] == "tool"]


def review_of(client: httpx.Client, run: Run) -> dict[str, Any]:
    """The newest review of a run."""
    found: list[dict[str, Any]] = client.get("/v1/reviews", params={"limit": 100}).json()["data"]
    return next(review for review in found if review["run_id"] == run["id"])


def decide(client: httpx.Client, run: Run, decision: str, **more: Any) -> httpx.Response:
    review = review_of(client, run)
    body = {"decision": decision, "args_hash": review["args_hash"], **more}
    return client.post(f"/v1/reviews/{review['id']}/decision", json=body)


# -- tools


def test_several_calls_of_one_reply_are_made_together_and_answered_in_order(stack: Stack, client: httpx.Client) -> None:
    began = time.monotonic()
    wanted = calls(("rest", {"seconds": 1.5}), ("add", {"left": 1}), ("rest", {"seconds": 1.4}), ("odd_text", {}))
    run, script = play(stack, client, [wanted, DONE])
    assert time.monotonic() - began < 2.8
    assert run["status"] == "succeeded"
    assert results_seen_by_the_model(script) == [
        as_data("rest", "rested"),
        as_data("add", '{"sum":2}'),
        as_data("rest", "rested"),
        as_data("odd_text", "nul \ufffd and surrogate \ufffd"),
    ]
    assert [step["seq"] for step in steps_of(client, run)] == [0, 1, 2, 3, 4, 5]


def test_a_tool_knows_its_run(stack: Stack, client: httpx.Client, tenant: str) -> None:
    run, _ = play(stack, client, [call("who_am_i"), DONE])
    assert json.loads(steps_of(client, run)[1]["result"]) == {"tenant": tenant, "attempt": 1, "run_id": run["id"]}


def test_a_tool_that_says_no_is_heard_by_the_model(stack: Stack, client: httpx.Client) -> None:
    run, script = play(stack, client, [call("refuse", {"why": "sold out"}), DONE])
    assert run["status"] == "succeeded"
    assert results_seen_by_the_model(script) == [as_data("refuse", "sold out")]
    assert steps_of(client, run)[1]["state"] == "failed"


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (call("crash"), "The tool failed unexpectedly."),
        (call("leave"), "The tool failed unexpectedly."),
        (call("cancel_itself"), "The tool failed unexpectedly."),
        (call("dawdle", {"seconds": 9}), "The tool took too long."),
    ],
)
def test_a_tool_that_breaks_tells_the_model_that_much_and_no_more(
    stack: Stack, client: httpx.Client, wanted: dict[str, Any], told: str
) -> None:
    run, script = play(stack, client, [wanted, DONE])
    assert run["status"] == "succeeded"
    assert results_seen_by_the_model(script) == [told]
    assert "a secret of the tool" not in json.dumps(steps_of(client, run))


def test_a_result_without_a_json_form_gets_one(stack: Stack, client: httpx.Client) -> None:
    run, _ = play(stack, client, [call("bytes_and_worse"), DONE])
    assert run["status"] == "succeeded"
    assert json.loads(steps_of(client, run)[1]["result"]) == {"bytes": "_w==", "surrogate": "\ufffd", "nan": None}


def test_an_unsafe_call_is_audited_before_and_after(stack: Stack, client: httpx.Client) -> None:
    run, _ = play(stack, client, [call("charge", {"amount": 5}), DONE])
    assert audit_of(client, run) == [
        "run.accepted",
        "run.claimed",
        "model.replied",
        "tool.intended",
        "tool.answered",
        "model.replied",
        "run.succeeded",
    ]
    assert steps_of(client, run)[1]["result"] == f"charged 5 as {run['id']}:1"


# -- mistakes of the model


def test_malformed_calls_go_back_to_the_model_with_what_is_wrong(stack: Stack, client: httpx.Client) -> None:
    wanted = calls(("no_such_tool", {}), ("echo", "{broken"), ("add", {"left": "many"}))
    run, script = play(stack, client, [wanted, DONE])
    assert run["status"] == "succeeded"
    unknown, broken, wrong = results_seen_by_the_model(script)
    assert "There is no tool named 'no_such_tool'. Tools: echo, add," in unknown
    assert "Invalid JSON" in broken
    assert "left: Input should be a valid integer" in wrong


def test_a_model_that_only_makes_malformed_calls_is_stopped(stack: Stack, client: httpx.Client) -> None:
    run, script = play(stack, client, [call("nothing", {"try": number}) for number in range(9)])
    assert run["stop_reason"] == "model_error"
    assert len(script.requests()) == 4


def test_a_good_step_forgives_earlier_mistakes(stack: Stack, client: httpx.Client) -> None:
    replies = []
    for number in range(4):
        replies += [call("nothing", {"try": number}), call("echo", {"text": str(number)})]
    run, _ = play(stack, client, [*replies, DONE], limits={"max_mistakes": 1})
    assert run["status"] == "succeeded"


@pytest.mark.parametrize(
    ("reply", "told"),
    [(say(""), "empty"), (say("much too lo", finish_reason="length"), "cut off")],
)
def test_a_reply_that_is_no_answer_is_corrected(
    stack: Stack, client: httpx.Client, reply: dict[str, Any], told: str
) -> None:
    run, script = play(stack, client, [reply, say("better")])
    assert run["output"] == "better"
    assert told in script.requests()[1]["messages"][-1]["content"]


def test_structured_output_is_validated_and_corrected(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [say('{"verdict": "good", "score": 11}'), say('{"verdict": "good", "score": 10}')])
    run = rest(client, submit(client, "typed", {"subject": script.input, "urgent": True}))
    assert run["output"] == {"verdict": "good", "score": 10}
    first, second = script.requests()
    assert first["response_format"]["json_schema"]["schema"]["required"] == ["verdict", "score"]
    assert json.loads(first["messages"][1]["content"]) == {"subject": script.input, "urgent": True}
    assert "score: Input should be less than or equal to 10" in second["messages"][-1]["content"]


# -- faults of the provider


@pytest.mark.parametrize("fault", ["status:429", "status:500", "status:503", "truncated", "bad_json", "disconnect"])
def test_a_passing_fault_of_the_provider_is_not_seen_in_the_run(stack: Stack, client: httpx.Client, fault: str) -> None:
    run, script = play(stack, client, [{"fault": fault}, say("after all")])
    assert run["output"] == "after all"
    assert run["usage"]["model_calls"] == 1
    assert steps_of(client, run)[0]["retries"] == 1
    assert len(script.requests()) == 2


@pytest.mark.parametrize("fault", ["stall", "slow_drip"])
def test_a_reply_that_does_not_come_is_asked_for_again(stack: Stack, client: httpx.Client, fault: str) -> None:
    script = Script(stack.model_url, [{"fault": fault}, say("after all")])
    run = rest(client, submit(client, "hasty", script.input))
    assert run["output"] == "after all"
    assert steps_of(client, run)[0]["retries"] == 1


def test_retry_after_is_respected(stack: Stack, client: httpx.Client) -> None:
    began = time.monotonic()
    run, _ = play(stack, client, [{"fault": "status:429", "retry_after": "1"}, DONE])
    assert run["status"] == "succeeded"
    assert time.monotonic() - began >= 1


def test_the_fallback_model_answers_when_the_first_stays_away(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [{"fault": "status:429", "retry_after": "3600"}], model="gpt-5")
    script.add([say("from the second")], model="gpt-5-nano")
    run = rest(client, submit(client, "with-fallback", script.input))
    assert run["output"] == "from the second"
    assert [(step["model"], step["retries"]) for step in steps_of(client, run)] == [("gpt-5-nano", 1)]


def test_a_model_without_a_price_costs_null(stack: Stack, client: httpx.Client) -> None:
    run = rest(client, submit(client, "free", Script(stack.model_url, [DONE]).input))
    assert run["status"] == "succeeded"
    assert run["usage"]["cost_usd"] is None


# -- cancelling


def test_a_cancel_abandons_a_tool_and_leaves_its_call_in_doubt(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [call("charge_slowly", {"amount": 1}), DONE])
    run = submit(client, "toolbox", script.input)
    stack.until(lambda: "tool.intended" in audit_of(client, run))
    client.post(f"/v1/runs/{run['id']}/cancel")
    ended = rest(client, run, seconds=2)
    assert (ended["status"], ended["stop_reason"]) == ("cancelled", "cancelled")
    assert [step["state"] for step in steps_of(client, run) if step["kind"] == "tool"] == ["in_doubt"]


def test_a_waiting_run_can_be_cancelled_and_its_review_is_void(stack: Stack, client: httpx.Client) -> None:
    run, _ = play(stack, client, [call("open_the_door"), DONE])
    assert run["status"] == "waiting"
    assert client.post(f"/v1/runs/{run['id']}/cancel").json()["status"] == "cancelled"
    assert review_of(client, run)["status"] == "void"
    assert decide(client, run, "approve").status_code == 409


def test_a_cancel_does_not_reach_another_tenants_run(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [say("slow", delay_s=1)])
    run = submit(client, "toolbox", script.input)
    stack.until(script.requests)
    key = make_key(stack.database_url, tenant="somebody-else", name="test")
    foreign = httpx.post(f"{stack.api.address}/v1/runs/{run['id']}/cancel", headers={"Authorization": f"Bearer {key}"})
    assert foreign.status_code == 404
    assert rest(client, run)["status"] == "succeeded"


def test_a_cancelled_run_is_dropped_by_its_worker_at_once(stack: Stack, client: httpx.Client) -> None:
    """The slot is free again long before a heartbeat would notice."""
    slow = stack.another_worker("one-slot", WORKER_CONCURRENCY="1", LEASE_SECONDS="60")
    stack.worker.stop()
    slow.start()
    try:
        script = Script(stack.model_url, [say("late", delay_s=30)])
        run = submit(client, "toolbox", script.input)
        stack.until(script.requests)
        client.post(f"/v1/runs/{run['id']}/cancel")
        following = submit(client, "toolbox", Script(stack.model_url, [DONE]).input)
        assert rest(client, following, seconds=5)["status"] == "succeeded"
    finally:
        slow.stop()


# -- people


def test_an_approved_call_is_made_and_the_run_goes_on(stack: Stack, client: httpx.Client) -> None:
    run, script = play(stack, client, [call("open_the_door"), DONE])
    assert run["status"] == "waiting"
    assert decide(client, run, "approve").status_code == 200
    ended = rest(client, run)
    assert ended["status"] == "succeeded"
    assert results_seen_by_the_model(script) == [as_data("open_the_door", "open")]
    assert ended["attempt"] == 2


def test_a_rejected_call_is_not_made_and_the_model_is_told_why(stack: Stack, client: httpx.Client) -> None:
    run, script = play(stack, client, [call("open_the_door"), DONE])
    decide(client, run, "reject", reason="not at night")
    assert rest(client, run)["status"] == "succeeded"
    assert results_seen_by_the_model(script) == ["A person rejected this call: not at night"]


def test_free_calls_are_made_while_others_wait_for_approval(stack: Stack, client: httpx.Client) -> None:
    run, script = play(stack, client, [calls(("pay", {"amount": 99}), ("pay", {"amount": 1})), DONE])
    assert run["status"] == "waiting"
    assert [step["result"] for step in steps_of(client, run) if step["kind"] == "tool"] == ["paid 1"]
    decide(client, run, "approve")
    assert rest(client, run)["status"] == "succeeded"
    assert results_seen_by_the_model(script) == [as_data("pay", "paid 99"), as_data("pay", "paid 1")]


def test_a_call_with_an_unknown_outcome_is_not_repeated_and_a_person_says_what_happened(
    stack: Stack, client: httpx.Client
) -> None:
    run, script = play(stack, client, [call("charge_and_crash", {"amount": 5}), DONE])
    assert run["status"] == "waiting"
    assert review_of(client, run)["kind"] == "in_doubt"
    assert decide(client, run, "respond", response="charged as 17").status_code == 200
    assert rest(client, run)["status"] == "succeeded"
    assert results_seen_by_the_model(script) == ["charged as 17"]


# -- crashes


def test_a_run_whose_worker_died_goes_on_from_its_last_step(stack: Stack, client: httpx.Client) -> None:
    replies = [call("charge", {"amount": 5}), call("kill_the_worker"), say("never asked twice for the first")]
    script = Script(stack.model_url, replies)
    run = submit(client, "toolbox", script.input, limits={"max_attempts": 2})
    stack.worker.wait(10)
    stack.worker.start()
    # The tool is READ, so it is called again, and kills the next worker as well: that was the last attempt.
    stack.worker.wait(20)
    stack.worker.start()
    stack.until(lambda: client.get(f"/v1/runs/{run['id']}").json()["status"] == "failed", seconds=20)
    assert client.get(f"/v1/runs/{run['id']}").json()["stop_reason"] == "max_attempts"
    assert len(script.requests()) == 2
    charged = [step for step in steps_of(client, run) if step["kind"] == "tool" and step["tool"] == "charge"]
    assert [(step["state"], step["attempt"]) for step in charged] == [("succeeded", 1)]


def test_a_worker_that_is_told_to_stop_hands_its_runs_to_another(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [call("echo", {"text": "a"}), say("slow", delay_s=3), DONE])
    run = submit(client, "toolbox", script.input)
    stack.until(lambda: len(script.requests()) == 2)
    began = time.monotonic()
    stack.worker.stop()
    assert time.monotonic() - began < 8
    now = client.get(f"/v1/runs/{run['id']}").json()
    assert now["status"] in ("queued", "succeeded")
    stack.worker.start()
    ended = rest(client, run)
    assert ended["status"] == "succeeded"
    assert [step["seq"] for step in steps_of(client, run)] == list(range(len(steps_of(client, run))))


def test_a_long_call_keeps_its_lease(stack: Stack, client: httpx.Client) -> None:
    """Longer than the lease of 3 seconds: the heartbeat extends it."""
    script = Script(stack.model_url, [say("at last", delay_s=6)])
    run = rest(client, submit(client, "toolbox", script.input))
    assert (run["output"], run["attempt"]) == ("at last", 1)
    assert len(script.requests()) == 1


def test_a_locked_row_does_not_cost_its_neighbours_their_leases(stack: Stack, client: httpx.Client) -> None:
    scripts = [Script(stack.model_url, [say("at last", delay_s=7)]) for _ in range(2)]
    locked, neighbour = (submit(client, "toolbox", script.input) for script in scripts)
    for script in scripts:
        stack.until(script.requests)
    with psycopg.connect(stack.database_url) as connection:
        connection.execute("SELECT FROM runs WHERE id = %s FOR UPDATE", [locked["id"]])
        time.sleep(5)
    assert rest(client, neighbour)["attempt"] == 1
    assert rest(client, locked)["status"] == "succeeded"


def test_a_run_that_was_taken_away_is_abandoned_within_a_heartbeat(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [say("from the first", delay_s=20), say("from the second")])
    run = submit(client, "toolbox", script.input)
    stack.until(script.requests)
    with psycopg.connect(stack.database_url, autocommit=True) as connection:
        connection.execute(
            "UPDATE runs SET lease_token = gen_random_uuid(), lease_until = now() WHERE id = %s", [run["id"]]
        )
    ended = rest(client, run)
    assert (ended["output"], ended["attempt"]) == ("from the second", 2)


def both_slots_are_free(stack: Stack, client: httpx.Client) -> bool:
    """Of a worker that has two: two runs of three seconds are executed at the same time."""
    both = [submit(client, "toolbox", Script(stack.model_url, [say("slow", delay_s=3)]).input) for _ in range(2)]
    began = time.monotonic()
    assert {rest(client, run)["status"] for run in both} == {"succeeded"}
    return time.monotonic() - began < 5.5


@pytest.fixture
def two_slots(stack: Stack) -> Iterator[None]:
    """The only worker executes two runs at a time, and its heartbeat is slower than its sweeper."""
    few = stack.another_worker("two-slots", WORKER_CONCURRENCY="2", LEASE_SECONDS="60")
    stack.worker.stop()
    few.start()
    try:
        yield
    finally:
        few.stop()


def test_an_id_that_redis_holds_twice_costs_no_slot(stack: Stack, client: httpx.Client, two_slots: None) -> None:
    for _ in range(3):
        script = Script(stack.model_url, [say("slow", delay_s=1)])
        run = submit(client, "toolbox", script.input)
        stack.until(script.requests)
        with redis.Redis.from_url(stack.redis_url) as connection:
            connection.rpush("rq:queue:runs", run["id"], "not a run")
        assert rest(client, run)["status"] == "succeeded"
    assert both_slots_are_free(stack, client)


def test_a_worker_that_takes_over_its_own_run_drops_the_old_attempt(
    stack: Stack, client: httpx.Client, two_slots: None
) -> None:
    script = Script(stack.model_url, [say("from the first", delay_s=20), say("from the second")])
    run = submit(client, "toolbox", script.input)
    stack.until(script.requests)
    with psycopg.connect(stack.database_url, autocommit=True) as connection:
        connection.execute("UPDATE runs SET lease_until = now() WHERE id = %s", [run["id"]])
    ended = rest(client, run)
    assert (ended["output"], ended["attempt"]) == ("from the second", 2)
    assert both_slots_are_free(stack, client)


def test_a_finished_effect_is_known_after_a_drain(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [calls(("rest", {"seconds": 20}), ("charge", {"amount": 5})), DONE])
    run = submit(client, "toolbox", script.input, limits={"deadline_s": 25})
    stack.until(lambda: "tool.intended" in audit_of(client, run))
    stack.worker.stop()
    states = {step["tool"]: step["state"] for step in steps_of(client, run) if step["kind"] == "tool"}
    assert states == {"charge": "succeeded"}
    assert client.get(f"/v1/runs/{run['id']}").json()["status"] == "queued"
    stack.worker.start()
    client.post(f"/v1/runs/{run['id']}/cancel")


# -- the queue


def test_rq_sees_the_queue_and_the_worker(stack: Stack, client: httpx.Client) -> None:
    submit(client, "toolbox", Script(stack.model_url, [DONE]).input)
    lines = stack.rq_info().splitlines()
    assert any(line.startswith("runs ") for line in lines)
    [worker] = [line for line in lines if f" {stack.worker.pid})" in line]
    assert "runs. jobs: " in worker


def test_a_run_accepted_while_redis_was_away_is_executed_when_it_is_back(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [DONE])
    stack.valkey.stop()
    try:
        run = submit(client, "toolbox", script.input)
        assert run["status"] == "queued"
    finally:
        stack.valkey.start()
    assert rest(client, run)["status"] == "succeeded"


def test_a_flushed_redis_loses_nothing(stack: Stack, client: httpx.Client) -> None:
    stack.worker.stop()
    scripts = [Script(stack.model_url, [DONE]) for _ in range(5)]
    runs = [submit(client, "toolbox", script.input) for script in scripts]
    stack.flush_redis()
    stack.worker.start()
    assert [rest(client, run)["status"] for run in runs] == ["succeeded"] * 5
