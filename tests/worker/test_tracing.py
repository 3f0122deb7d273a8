"""The trace of a run, as back ends receive it from real workers: whole, in order, whoever ended the run and however."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
import pytest

from tests.otlp import BackEnd, Span, receiver
from tests.scripts import DONE, Run, Script, call, calls, rest, submit
from tests.stack import Stack


@dataclass(frozen=True)
class Traced:
    """A stack whose worker sends traces to `back_end`."""

    stack: Stack
    client: httpx.Client
    back_end: BackEnd

    def play(self, agent: str, *replies: dict[str, Any], **more: Any) -> Run:
        """A run of a script, at rest."""
        script = Script(self.stack.model_url, list(replies))
        return rest(self.client, submit(self.client, agent, script.input, **more))

    def decide(self, run: Run, decision: str, **more: Any) -> None:
        (review,) = self.client.get("/v1/reviews", params={"status": "pending"}).json()["data"]
        assert review["run_id"] == run["id"]
        body = {"decision": decision, "args_hash": review["args_hash"], **more}
        assert self.client.post(f"/v1/reviews/{review['id']}/decision", json=body).status_code == 200

    def trace(self, run: Run) -> "Trace":
        return Trace(run, self.back_end.until_root(run["id"]))


class Trace:
    """The spans of a run. What holds for every trace is checked here."""

    def __init__(self, run: Run, spans: list[Span]) -> None:
        self.spans = sorted(spans, key=lambda span: span.start)
        (self.root,) = [span for span in spans if span.parent_id is None]
        self.below = [span for span in self.spans if span is not self.root]
        assert self.root.trace_id == UUID(run["id"]).hex
        assert self.root.span_id == self.root.trace_id[16:]
        assert self.root.name == f"invoke_agent {run['agent']}"
        assert [span for span in spans if span.attributes.get("langfuse.internal.is_app_root")] == [self.root]
        assert len({span.span_id for span in spans}) == len(spans)
        for span in self.below:
            assert span.parent_id == self.root.span_id
            assert self.root.start <= span.start <= span.end <= self.root.end, span.name
        for span in spans:
            assert span.attributes["agent_service.run.id"] == run["id"]
            assert span.attributes["gen_ai.agent.name"] == run["agent"]
            assert span.status != "ok"  # Datadog takes whatever is set as an error

    def named(self, name: str) -> list[Span]:
        return [span for span in self.below if span.name == name]

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.below]

    @property
    def chats(self) -> list[Span]:
        return [span for span in self.below if span.name.startswith("chat ")]


@pytest.fixture(scope="module")
def back_end() -> Iterator[BackEnd]:
    with receiver("langfuse") as back_end:
        yield back_end


@pytest.fixture(scope="module")
def _traced_stack(_service: Stack, back_end: BackEnd) -> Iterator[Stack]:
    """The stack that all tests share; for a while its worker sends traces."""
    worker = _service.worker
    usual = worker.env or {}
    try:
        worker.env = {**usual, **back_end.settings}
        worker.restart()
        yield _service
    finally:
        worker.env = usual
        worker.restart()


@pytest.fixture
def traced(_traced_stack: Stack, stack: Stack, client: httpx.Client, back_end: BackEnd) -> Traced:
    return Traced(stack, client, back_end)


def test_a_run_is_told_from_its_acceptance_to_its_answer(traced: Traced) -> None:
    run = traced.play(
        "toolbox", calls(("echo", {"text": "one"}), ("add", {"left": 1})), DONE, metadata={"user_id": "u-1"}
    )
    trace = traced.trace(run)
    assert sorted(trace.names) == [
        "chat gpt-5-mini",
        "chat gpt-5-mini",
        "execute_tool add",
        "execute_tool echo",
        "queued",
    ]
    assert trace.below[0].name == "queued"
    kinds = {span.name.split()[0]: span.attributes["openinference.span.kind"] for span in trace.spans}
    assert kinds == {"invoke_agent": "AGENT", "queued": "CHAIN", "chat": "LLM", "execute_tool": "TOOL"}

    root = trace.root.attributes
    assert root["agent_service.run.status"] == "succeeded"
    assert root["agent_service.run.stop_reason"] == "final_answer"
    assert json.loads(root["gen_ai.input.messages"])[0]["parts"][0]["content"] == run["input"]
    assert json.loads(root["gen_ai.output.messages"])[0]["parts"][0]["content"] == "done"
    assert (root["input.value"], root["output.value"]) == (run["input"], "done")
    assert root["agent_service.run.cost_usd"] == pytest.approx(run["usage"]["cost_usd"])
    assert trace.root.resource["service.name"] == "agent-service"

    usage = run["usage"]
    for name, attribute in (
        ("input_tokens", "gen_ai.usage.input_tokens"),
        ("cached_tokens", "gen_ai.usage.cache_read.input_tokens"),
        ("output_tokens", "gen_ai.usage.output_tokens"),
        ("cost_usd", "gen_ai.usage.cost"),
    ):
        assert sum(span.attributes[attribute] for span in trace.chats) == pytest.approx(usage[name]), name
        assert attribute not in root
    first, second = trace.chats
    assert first.attributes["gen_ai.response.finish_reasons"] == ["tool_calls"]
    asked = json.loads(second.attributes["gen_ai.input.messages"])
    assert [message["role"] for message in asked] == ["user", "assistant", "tool", "tool"]
    assert "You have every tool." in first.attributes["gen_ai.system_instructions"]

    (echo,) = trace.named("execute_tool echo")
    assert json.loads(echo.attributes["gen_ai.tool.call.arguments"]) == {"text": "one"}
    assert echo.attributes["gen_ai.tool.call.result"] == "one"
    assert echo.attributes["agent_service.tool.effect"] == "read"
    for span in [*trace.chats, echo]:
        assert span.attributes["agent_service.attempt"] == 1
        assert span.attributes["agent_service.worker"] == span.resource["service.instance.id"]
        assert span.attributes["user.id"] == "u-1"
    assert first.end <= echo.start
    assert echo.end <= second.start
    assert {score["name"]: score["value"] for score in traced.back_end.until_scores(run["id"], 1)} == {"succeeded": 1}


def test_calls_that_failed_are_seen_with_those_that_took_their_place(traced: Traced) -> None:
    script = Script(traced.stack.model_url, [{"fault": "status:500"}] * 4, model="gpt-5")
    script.add([DONE], model="gpt-5-nano")
    run = rest(traced.client, submit(traced.client, "with-fallback", script.input), seconds=60)
    assert run["status"] == "succeeded"
    trace = traced.trace(run)
    *failed, answered = trace.chats
    assert [span.name for span in failed] == ["chat gpt-5"] * 4
    assert [span.attributes["agent_service.model.try"] for span in trace.chats] == [1, 2, 3, 4, 5]
    assert [span.attributes["agent_service.model.is_retry"] for span in trace.chats] == [False, True, True, True, False]
    for span in failed:
        assert span.status == "error"
        assert span.attributes["error.type"] == "ModelUnavailable"
        assert "HTTP 500" in span.status_message
        assert [event.name for event in span.events] == ["exception"]
        assert "gen_ai.usage.input_tokens" not in span.attributes
    assert answered.name == "chat gpt-5-nano"
    assert answered.attributes["agent_service.model.is_fallback"]
    assert answered.status == "unset"
    assert trace.root.status == "unset"


def test_what_became_of_each_tool_call_is_seen_also_of_those_that_were_not_made(traced: Traced) -> None:
    wanted = calls(
        ("refuse", {"why": "closed"}), ("crash", {}), ("dawdle", {"seconds": 5}), ("made_up", {}), ("add", {})
    )
    trace = traced.trace(traced.play("toolbox", wanted, DONE))
    states = {span.name: span.attributes["agent_service.tool.state"] for span in trace.below if "tool" in span.name}
    assert states == {
        "execute_tool refuse": "failed",
        "execute_tool crash": "crashed",
        "execute_tool dawdle": "crashed",
        "execute_tool made_up": "invalid",
        "execute_tool add": "invalid",
    }
    (refused,) = trace.named("execute_tool refuse")
    assert (refused.status, refused.status_message) == ("error", "closed")
    (dawdled,) = trace.named("execute_tool dawdle")
    assert 0.15 < dawdled.seconds < 3
    assert "a secret of the tool" not in str(trace.spans)


def test_waiting_for_a_person_is_a_span_and_the_decision_a_score(traced: Traced) -> None:
    run = traced.play("toolbox", call("open_the_door"), DONE)
    assert run["status"] == "waiting"
    traced.decide(run, "approve", reason="she has a key")
    run = rest(traced.client, run)
    trace = traced.trace(run)
    (wait,) = trace.named("wait for person")
    assert wait.attributes["agent_service.review.outcome"] == "approve"
    assert wait.attributes["agent_service.review.tool"] == "open_the_door"
    assert wait.attributes["agent_service.review.decided_by"].startswith("key:")
    assert "gen_ai.tool.name" not in wait.attributes
    assert len(trace.named("queued")) == 2
    (door,) = trace.named("execute_tool open_the_door")
    assert wait.end <= door.start
    assert door.attributes["agent_service.attempt"] == 2
    scores = {score["name"]: score["value"] for score in traced.back_end.until_scores(run["id"], 2)}
    assert scores == {"succeeded": 1, "human_decision": "approve"}


def test_a_run_that_no_worker_ended_has_its_whole_trace_too(traced: Traced) -> None:
    cancelled = traced.play("toolbox", call("open_the_door"))
    assert traced.client.post(f"/v1/runs/{cancelled['id']}/cancel").status_code == 202
    rejected = traced.play("escalating", *[call("echo", {"text": "again"})] * 5)
    traced.decide(rejected, "reject", reason="enough")
    expired = traced.play("impatient", call("open_the_door"))

    trace = traced.trace(cancelled)
    assert trace.root.attributes["agent_service.run.status"] == "cancelled"
    assert trace.root.status == "unset"
    assert trace.named("wait for person")[0].attributes["agent_service.review.outcome"] == "void"

    trace = traced.trace(rejected)
    assert trace.root.status == "error"
    assert trace.root.attributes["error.type"] == "loop_detected"
    (wait,) = trace.named("wait for person")
    assert wait.attributes["agent_service.review.outcome"] == "reject"

    trace = traced.trace(expired)
    assert trace.root.attributes["error.type"] == "review_expired"
    assert trace.named("wait for person")[0].attributes["agent_service.review.outcome"] == "expired"


def test_a_run_that_was_cancelled_in_the_queue_was_queued_until_then(traced: Traced) -> None:
    traced.stack.worker.pause()
    run = submit(traced.client, "toolbox", "script:unknown")
    traced.client.post(f"/v1/runs/{run['id']}/cancel")
    traced.stack.worker.resume()
    trace = traced.trace(run)
    assert trace.names == ["queued"]
    assert trace.below[0].end == trace.root.end


def test_a_run_whose_worker_was_killed_goes_on_in_the_same_trace(traced: Traced) -> None:
    script = Script(
        traced.stack.model_url, [call("echo", {"text": "before"}), call("rest", {"seconds": 4}), DONE, DONE]
    )
    run = submit(traced.client, "toolbox", script.input)
    traced.back_end.until(run["id"], 4)  # queued, chat, echo, chat
    traced.stack.worker.kill()
    traced.stack.worker.start()
    run = rest(traced.client, run)
    assert run["attempt"] == 2
    trace = traced.trace(run)
    assert [span.attributes["agent_service.attempt"] for span in trace.named("queued")] == [1, 2]
    (lost,) = trace.named("attempt lost")
    assert lost.status == "error"
    assert trace.named("queued")[0].end == lost.start
    assert lost.end == trace.named("queued")[1].start
    (echo,) = trace.named("execute_tool echo")
    (rested,) = trace.named("execute_tool rest")
    assert (echo.attributes["agent_service.attempt"], rested.attributes["agent_service.attempt"]) == (1, 2)
    assert echo.attributes["agent_service.worker"] != rested.attributes["agent_service.worker"]


def test_the_trace_is_linked_to_the_callers(traced: Traced) -> None:
    theirs = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    script = Script(traced.stack.model_url, [DONE])
    answer = traced.client.post("/v1/runs", json={"agent": "toolbox", "input": script.input}, headers=theirs)
    trace = traced.trace(rest(traced.client, answer.json()))
    (link,) = trace.root.links
    assert (link.trace_id, link.span_id) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
