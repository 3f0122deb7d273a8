"""A run that came through everything, as Phoenix shows it."""

import json
from datetime import timedelta
from itertools import pairwise
from uuid import UUID

import psutil
import pytest

from app.devstack.ports import LOOPBACK
from tests.phoenix.conftest import E_MAIL, NANO, SECRET, Service, Story, names
from tests.phoenix.server import Phoenix, Span
from tests.scripts import Script, call, rest, submit

ROUNDED = timedelta(microseconds=2)
"""Phoenix keeps times as seconds in a float."""


@pytest.fixture
def root(story: Story) -> Span:
    [root] = [span for span in story.trace.spans if span.parent is None]
    return root


def test_the_run_arrives_complete_and_in_order(story: Story) -> None:
    expected = [
        "invoke_agent courier",
        "queued",
        "chat gpt-5",
        "chat gpt-5",
        "execute_tool echo",
        "execute_tool refuse",
        "chat gpt-5",
        f"chat {NANO}",
        "wait for person",
        "queued",
        "attempt lost",
        "execute_tool open_the_door",
        "queued",
        "chat gpt-5",
    ]
    found = story.trace.names
    found[4:6] = sorted(found[4:6])  # made at the same time
    assert found == expected


def test_everything_is_below_one_root_in_the_trace_that_has_the_runs_id(story: Story, root: Span) -> None:
    run_id = UUID(story.run["id"])
    assert root.id == run_id.hex[16:]
    assert {span.parent for span in story.trace.spans if span is not root} == {root.id}
    assert story.trace.seen["rootSpan"]["spanId"] == root.id
    assert {span.said["agent_service.run.id"] for span in story.trace.spans} == {str(run_id)}


def test_each_span_is_of_its_kind(story: Story) -> None:
    kinds = {name: {span.seen["spanKind"] for span in story.trace.named(name)} for name in story.trace.names}
    assert kinds == {
        "invoke_agent courier": {"agent"},
        "queued": {"chain"},
        "wait for person": {"chain"},
        "attempt lost": {"chain"},
        "chat gpt-5": {"llm"},
        f"chat {NANO}": {"llm"},
        "execute_tool echo": {"tool"},
        "execute_tool refuse": {"tool"},
        "execute_tool open_the_door": {"tool"},
    }


def test_tokens_and_cost_are_those_of_the_run(story: Story) -> None:
    usage = story.run["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["cached_tokens"]) == (6700, 70, 3072)
    answered = [span for span in story.trace.of_kind("llm") if not span.has_failed]
    seen = [
        (span.seen["tokenCountPrompt"], span.seen["tokenCountCompletion"], span.seen["tokenPromptDetails"]["cacheRead"])
        for span in answered
    ]
    assert seen == [(2000, 40, 1024), (2200, 20, 0), (2500, 10, 2048)]
    cost = float(usage["cost_usd"])
    assert cost > 0
    assert sum(span.said["gen_ai.usage.cost"] for span in answered) == pytest.approx(cost)
    assert sum(span.said["llm.cost.total"] for span in answered) == pytest.approx(cost)


def test_nothing_is_added_up_twice(story: Story, root: Span) -> None:
    assert not [name for name in root.said if name.startswith("gen_ai.usage.")]
    usage, seen = story.run["usage"], story.trace.seen
    assert seen["costSummary"]["total"]["tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert seen["costSummary"]["total"]["cost"] == pytest.approx(float(usage["cost_usd"]))  # by its own prices
    assert seen["rootSpan"]["cumulativeTokenCountPrompt"] == usage["input_tokens"]
    assert seen["rootSpan"]["cumulativeTokenCountCompletion"] == usage["output_tokens"]


def test_what_failed_is_an_error_and_says_why(story: Story, root: Span) -> None:
    failed = {(span.name, span.said["error.type"]) for span in story.trace.spans if span.has_failed}
    assert failed == {
        ("chat gpt-5", "ModelUnavailable"),
        ("execute_tool refuse", "failed"),
        ("attempt lost", "lease_lost"),
    }
    unavailable, tools, limited, spare, _ = story.trace.of_kind("llm")
    assert "503" in unavailable.seen["statusMessage"]
    assert "429" in limited.seen["statusMessage"]
    assert "it is locked" in story.trace.named("execute_tool refuse")[0].seen["statusMessage"]
    assert not root.has_failed
    shown = ("agent_service.model.try", "agent_service.model.is_retry", "agent_service.model.is_fallback")
    assert [tuple(call.said[name] for name in shown) for call in (unavailable, tools, limited, spare)] == [
        (1, False, False),
        (2, True, False),
        (1, False, False),
        (2, False, True),
    ]


def test_the_attempts_of_two_workers_are_told_apart(story: Story, root: Span) -> None:
    assert [span.said["agent_service.attempt"] for span in story.trace.named("queued")] == [1, 2, 3]
    calls = [span for span in story.trace.spans if "agent_service.worker" in span.said]
    assert [span.said["agent_service.attempt"] for span in calls] == [1] * 6 + [2, 3]
    first, second = {span.said["agent_service.worker"] for span in calls[:7]}, calls[7].said["agent_service.worker"]
    assert len(first) == 1
    assert second not in first
    assert root.said["agent_service.attempt"] == story.run["attempt"] == 3


def test_times_are_in_order_and_those_of_the_run(story: Story, root: Span) -> None:
    for span in story.trace.spans:
        assert root.begins - ROUNDED <= span.begins <= span.ends <= root.ends + ROUNDED, span.name
    attempts = [
        [span for span in story.trace.spans if span.said.get("agent_service.attempt") == number and span is not root]
        for number in (1, 2, 3)
    ]
    for before, after in pairwise(attempts):
        assert max(span.ends for span in before) <= min(span.begins for span in after)
    spent = story.run["usage"]["latency_ms"]
    assert root.ms == pytest.approx(spent["total"], abs=2)
    assert sum(span.ms for span in story.trace.named("queued")) == pytest.approx(spent["queued"], abs=5)
    assert sum(span.ms for span in story.trace.named("wait for person")) == pytest.approx(spent["human"], abs=5)
    assert sum(span.ms for span in story.trace.of_kind("llm")) <= spent["model"] + 5


def test_what_was_asked_and_answered_can_be_read(story: Story, root: Span) -> None:
    assert root.seen["output"]["value"] == "brought"
    *_, last = story.trace.of_kind("llm")
    roles = [message["message"]["role"] for message in last.said["llm.input_messages"]]
    assert roles == ["system", "user", "assistant", "tool", "tool", "assistant", "tool"]
    assert last.said["llm.output_messages"] == [
        {"message": {"role": "assistant", "content": "brought", "finish_reason": "stop"}}
    ]
    [tools] = [span for span in story.trace.of_kind("llm") if span.said.get("llm.finish_reason") == "tool_calls"][:1]
    asked = [call["tool_call"]["function"] for call in tools.said["llm.output_messages"][0]["message"]["tool_calls"]]
    assert [call["name"] for call in asked] == ["echo", "refuse"]
    assert json.loads(asked[1]["arguments"]) == {"why": "it is locked"}
    [refuse] = story.trace.named("execute_tool refuse")
    assert refuse.said["tool.parameters.why"] == "it is locked"
    assert "it is locked" in refuse.seen["output"]["value"]
    [wait] = story.trace.named("wait for person")
    assert wait.said["agent_service.review.outcome"] == "approve"
    assert (wait.said["agent_service.review.tool"], wait.seen["output"]["value"]) == ("open_the_door", "let it in")


def test_secrets_and_people_do_not_leave_the_service(story: Story) -> None:
    everything = json.dumps([span.seen for span in story.trace.spans])
    assert SECRET not in everything
    assert E_MAIL not in everything


def test_the_run_is_found_by_project_user_session_and_version(story: Story, root: Span) -> None:
    seen = story.trace.seen
    assert (seen["project"]["name"], seen["userId"], seen["session"]["sessionId"]) == ("agent-service", "u-1", "s-1")
    assert {span.said["gen_ai.agent.version"] for span in story.trace.spans} == {"7"}
    assert root.said["agent_service.run.stop_reason"] == "final_answer"


def test_the_api_says_where_people_see_it(phoenix: Phoenix, story: Story) -> None:
    address = story.run["traces"]["phoenix"]
    assert address == f"{phoenix.address}/redirects/traces/{UUID(story.run['id']).hex}"
    assert phoenix.get(address).status_code == 200


def test_a_run_that_ends_outside_of_a_worker_has_its_root_too(phoenix: Phoenix, service: Service, story: Story) -> None:
    script = Script(service.stack.model_url, [])
    script.add([call("open_the_door")], model="gpt-5")
    run = submit(service.client, "courier", script.input)
    assert rest(service.client, run)["status"] == "waiting"
    service.client.post(f"/v1/runs/{run['id']}/cancel").raise_for_status()
    service.stack.until(lambda: "invoke_agent courier" in names(phoenix, run), seconds=20)
    trace = phoenix.trace(run["trace_id"])
    assert trace is not None
    assert trace.names == ["invoke_agent courier", "queued", "chat gpt-5", "wait for person"]
    assert trace.spans[0].said["agent_service.run.status"] == "cancelled"
    assert trace.spans[-1].said["agent_service.review.outcome"] == "void"


def test_phoenix_itself_talks_to_this_machine_alone(phoenix: Phoenix, story: Story) -> None:
    connections = psutil.Process(phoenix.pid).net_connections("inet")
    assert connections
    assert {connection.laddr.ip for connection in connections} == {LOOPBACK}
