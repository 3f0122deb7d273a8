"""Every way in which a run can end, reached through the API."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from app.domain.run import StopReason
from tests.scripts import DONE, Run, Script, audit_of, call, rest, say, steps_of, submit
from tests.spending import give_budget, rows
from tests.stack import Stack

Ending = Callable[[Stack, httpx.Client], Run]
ENDINGS: dict[StopReason, Ending] = {}


def ends_with(reason: StopReason) -> Callable[[Ending], Ending]:
    def register(ending: Ending) -> Ending:
        ENDINGS[reason] = ending
        return ending

    return register


def play(stack: Stack, client: httpx.Client, agent: str, replies: list[dict[str, Any]], **more: Any) -> Run:
    return rest(client, submit(client, agent, Script(stack.model_url, replies).input, **more))


@ends_with(StopReason.FINAL_ANSWER)
def _(stack: Stack, client: httpx.Client) -> Run:
    run = play(stack, client, "toolbox", [call("echo", {"text": "hi"}), say("The answer.")])
    assert run["output"] == "The answer."
    assert run["usage"]["model_calls"] == 2
    return run


@ends_with(StopReason.PERSON_ANSWERED)
def _(stack: Stack, client: httpx.Client) -> Run:
    run = play(stack, client, "escalating", [call("echo", {"text": "hi"}), DONE], limits={"max_steps": 1})
    [review] = [entry for entry in client.get("/v1/reviews").json()["data"] if entry["run_id"] == run["id"]]
    decision = {"decision": "respond", "args_hash": review["args_hash"], "response": "I know it."}
    assert client.post(f"/v1/reviews/{review['id']}/decision", json=decision).status_code == 200
    run = rest(client, run)
    assert run["output"] == "I know it."
    assert run["usage"]["model_calls"] == 1
    return run


@ends_with(StopReason.MAX_STEPS)
def _(stack: Stack, client: httpx.Client) -> Run:
    replies = [call("echo", {"text": str(number)}) for number in range(5)]
    run = play(stack, client, "toolbox", replies, limits={"max_steps": 3})
    assert run["usage"]["model_calls"] == 3
    return run


@ends_with(StopReason.MAX_TOKENS)
def _(stack: Stack, client: httpx.Client) -> Run:
    usage = {"prompt_tokens": 900, "completion_tokens": 100}
    replies = [call("echo", {"text": str(number)}, usage=usage) for number in range(5)]
    run = play(stack, client, "toolbox", replies, limits={"max_tokens": 2000})
    assert run["usage"]["model_calls"] == 2
    assert run["usage"]["input_tokens"] + run["usage"]["output_tokens"] == 2000
    return run


@ends_with(StopReason.MAX_COST)
def _(stack: Stack, client: httpx.Client) -> Run:
    # 40,000 input tokens cost 1 cent: the second call might cost more than what is left of 2 cents, so it is not made.
    usage = {"prompt_tokens": 40_000, "completion_tokens": 0}
    replies = [call("echo", {"text": str(number)}, usage=usage) for number in range(5)]
    run = play(stack, client, "toolbox", replies, limits={"max_cost_usd": 0.025})
    assert run["usage"]["model_calls"] == 1
    assert run["usage"]["cost_usd"] == 0.01
    return run


@ends_with(StopReason.BUDGET)
def _(stack: Stack, client: httpx.Client) -> Run:
    usage = {"prompt_tokens": 40_000, "completion_tokens": 0}
    script = Script(stack.model_url, [call("rest", {"seconds": 1}, usage=usage), DONE])
    run = submit(client, "toolbox", script.input)
    [found] = rows(stack.database_url, "SELECT tenant FROM runs WHERE id = %s", run["id"])
    stack.until(lambda: len(steps_of(client, run)) == 1)
    give_budget(stack.database_url, found["tenant"], "0.005")
    run = rest(client, run)
    assert run["usage"]["model_calls"] == 1
    assert "the budget is renewed at midnight UTC" in run["error"]
    return run


@ends_with(StopReason.DEADLINE)
def _(stack: Stack, client: httpx.Client) -> Run:
    return play(stack, client, "toolbox", [say("late", delay_s=20)], limits={"deadline_s": 0.4})


@ends_with(StopReason.LOOP_DETECTED)
def _(stack: Stack, client: httpx.Client) -> Run:
    # Another spelling of the same arguments is the same call.
    replies = [call("add", arguments) for arguments in ('{"left": 1, "right": 2}', '{"right":2,"left":1}')]
    run = play(stack, client, "toolbox", [*replies, *replies, DONE])
    assert run["usage"]["model_calls"] == 4
    return run


@ends_with(StopReason.MODEL_ERROR)
def _(stack: Stack, client: httpx.Client) -> Run:
    run = play(stack, client, "toolbox", [{"fault": "status:400"}])
    assert run["error"] == "The model gave no usable reply."
    return run


@ends_with(StopReason.TOOL_ERROR)
def _(stack: Stack, client: httpx.Client) -> Run:
    run = play(stack, client, "toolbox", [call("crash")] * 5, limits={"max_repeats": 3, "max_mistakes": 2})
    assert run["usage"]["model_calls"] == 3
    return run


@ends_with(StopReason.INVALID_OUTPUT)
def _(stack: Stack, client: httpx.Client) -> Run:
    subject = Script(stack.model_url, [say("not JSON")] * 9).input
    run = rest(client, submit(client, "typed", {"subject": subject}))
    assert run["usage"]["model_calls"] == 4  # asked, and corrected three times
    return run


def _waiting_for_the_door(stack: Stack, client: httpx.Client, agent: str = "toolbox") -> Run:
    run = play(stack, client, agent, [call("open_the_door"), DONE])
    assert run["status"] == "waiting"
    return run


@ends_with(StopReason.REJECTED)
def _(stack: Stack, client: httpx.Client) -> Run:
    run = _waiting_for_the_door(stack, client)
    [review] = [entry for entry in client.get("/v1/reviews").json()["data"] if entry["run_id"] == run["id"]]
    decision = {"decision": "reject", "args_hash": review["args_hash"], "reason": "closed today", "end_run": True}
    assert client.post(f"/v1/reviews/{review['id']}/decision", json=decision).status_code == 200
    return rest(client, run)


@ends_with(StopReason.REVIEW_EXPIRED)
def _(stack: Stack, client: httpx.Client) -> Run:
    run = _waiting_for_the_door(stack, client, "impatient")
    return _until_ended(client, run)


@ends_with(StopReason.MAX_ATTEMPTS)
def _(stack: Stack, client: httpx.Client) -> Run:
    script = Script(stack.model_url, [call("kill_the_worker")])
    run = submit(client, "toolbox", script.input, limits={"max_attempts": 1})
    stack.worker.wait(10)
    stack.worker.start()
    return _until_ended(client, run)


@ends_with(StopReason.CANCELLED)
def _(stack: Stack, client: httpx.Client) -> Run:
    script = Script(stack.model_url, [say("late", delay_s=20)])
    run = submit(client, "toolbox", script.input)
    stack.until(script.requests)
    assert client.post(f"/v1/runs/{run['id']}/cancel").status_code == 202
    return rest(client, run, seconds=2)


@ends_with(StopReason.INTERNAL_ERROR)
def _(stack: Stack, client: httpx.Client) -> Run:
    run = rest(client, submit(client, "broken", "hello"))
    assert "a bug in an agent" not in str(run)
    assert run["id"] in run["error"]
    return run


def _until_ended(client: httpx.Client, run: Run) -> Run:
    for _ in range(100):
        run = rest(client, run) if run["status"] != "waiting" else client.get(f"/v1/runs/{run['id']}").json()
        if run["status"] != "waiting":
            break
        Stack.pause()
    return run


def test_every_stop_reason_has_its_test() -> None:
    assert set(ENDINGS) == set(StopReason)


@pytest.mark.parametrize("reason", StopReason)
def test_a_run_ends_with(reason: StopReason, stack: Stack, client: httpx.Client) -> None:
    run = ENDINGS[reason](stack, client)
    assert run["stop_reason"] == reason
    assert run["status"] == reason.status
    assert run["ended_at"] is not None
    last = audit_of(client, run)[-1]
    assert last == f"run.{run['status']}"
