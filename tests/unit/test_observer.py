"""Telling of runs harms none of them."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from pydantic import SecretStr

from app.config import Settings
from app.domain.build import Build
from app.domain.errors import ModelUnavailable
from app.domain.run import RunStatus, StopReason
from app.domain.step import ToolState, Usage
from app.domain.tool import Effect
from app.metrics import make_registry
from app.prices import Price
from app.redaction import Redaction
from app.registry import load_agents
from tests.unit.test_plan import ASKED, RUN, asked, recorded, state_of
from worker.llm.base import ModelReply, ModelRequest
from worker.metrics import WorkerMetrics
from worker.observer import Observer
from worker.state import RunState
from worker.tracing import Tracer
from worker.transcript import transcript

SETTINGS = Settings(database_url=SecretStr("postgresql://db/x"), redis_url=SecretStr("redis://r"))
REPLY = ModelReply(content="yes", tool_calls=(), finish_reason="stop", usage=Usage(input_tokens=7, output_tokens=2))


class Collected(SpanProcessor):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


class Broken(SpanProcessor):
    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("a bug in telemetry")


def observer_with(processor: SpanProcessor) -> Observer:
    agents = load_agents(["tests.agents"])
    tracer = Tracer(SETTINGS, worker="w", redaction=Redaction())
    tracer.provider.add_span_processor(processor)
    metrics = WorkerMetrics(make_registry(Build()), agents, model=None)
    return Observer(metrics=metrics, agents=agents, tracer=tracer)


def request_of(state: RunState, model: str = "gpt-5-mini") -> ModelRequest:
    return ModelRequest(
        model=model, messages=transcript(state), tools=(), output=None, max_output_tokens=9, timeout_s=1
    )


class Provider:
    """Gives these answers, one after the other."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def complete(self, request: ModelRequest) -> ModelReply:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, ModelReply)
        return answer


def ask(observer: Observer, *answers: Any, models: tuple[str, ...]) -> list[Any]:
    """One step of a run: the models that are asked for it, in order."""
    state = state_of(asked(("echo", {"text": "x"})))
    state.prices = {"gpt-5-mini": Price(input=Decimal(1), cached_input=Decimal(1), output=Decimal(1))}
    watched = observer.claimed(RUN).watched(Provider(*answers), state)

    async def each() -> list[Any]:
        return await asyncio.gather(
            *(watched.complete(request_of(state, model)) for model in models), return_exceptions=True
        )

    return asyncio.run(each())


def test_a_run_goes_on_whatever_breaks_in_what_is_told_of_it(caplog: pytest.LogCaptureFixture) -> None:
    observer = observer_with(Broken())
    assert ask(observer, REPLY, models=("gpt-5-mini",)) == [REPLY]
    observer.ended(replace(RUN, status=RunStatus.SUCCEEDED, ended_at=ASKED))
    assert [record.getMessage() for record in caplog.records] == ["telemetry failed"] * 3


def test_an_error_of_the_model_is_told_and_passed_on() -> None:
    collected = Collected()
    error = ModelUnavailable("HTTP 503")
    answers = ask(observer_with(collected), error, error, REPLY, models=("gpt-5", "gpt-5", "gpt-5-mini"))
    assert answers == [error, error, REPLY]
    chats = [span for span in collected.spans if span.name.startswith("chat")]
    told = [
        tuple((span.attributes or {}).get(f"agent_service.model.{name}") for name in ("try", "is_retry", "is_fallback"))
        for span in chats
    ]
    assert told == [(1, False, False), (2, True, False), (3, False, True)]
    assert (chats[-1].attributes or {})["gen_ai.usage.cost"] == pytest.approx(9e-6)


def test_a_call_that_is_broken_off_is_told_of() -> None:
    collected = Collected()
    [answer] = ask(observer_with(collected), asyncio.CancelledError(), models=("gpt-5-mini",))
    assert isinstance(answer, asyncio.CancelledError)
    assert (collected.spans[-1].attributes or {})["error.type"] == "CancelledError"


def test_the_root_is_the_last_half_of_the_runs_id_and_everything_else_is_below_it() -> None:
    collected = Collected()
    observer = observer_with(collected)
    ask(observer, REPLY, models=("gpt-5-mini",))
    observer.ended(replace(RUN, status=RunStatus.SUCCEEDED, ended_at=ASKED + timedelta(seconds=1)))
    *below, root = collected.spans
    assert root.parent is None
    assert root.context is not None
    assert (root.context.trace_id, root.context.span_id) == (RUN.id.int, RUN.id.int & (2**64 - 1))
    for span in below:
        assert span.context is not None
        assert span.parent is not None
        assert (span.context.trace_id, span.parent.span_id) == (RUN.id.int, root.context.span_id)
        assert span.context.span_id != root.context.span_id


def test_a_clock_that_is_wrong_does_not_move_spans_before_the_claim() -> None:
    collected = Collected()
    behind = replace(RUN, running_since=ASKED + timedelta(hours=2), queued_at=ASKED + timedelta(hours=1))
    observer = observer_with(collected)
    state = state_of(asked(("echo", {"text": "x"})))
    asyncio.run(observer.claimed(behind).watched(Provider(REPLY), state).complete(request_of(state)))
    queued, chat = collected.spans
    assert queued.end_time is not None
    assert chat.start_time is not None
    assert 0 <= chat.start_time - queued.end_time < 1e9


def test_a_span_does_not_end_before_it_began() -> None:
    collected = Collected()
    observer_with(collected).ended(
        replace(RUN, status=RunStatus.SUCCEEDED, attempt=1, ended_at=RUN.created_at - timedelta(seconds=1))
    )
    [root] = collected.spans
    assert root.end_time == root.start_time


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": "done"}, ("done", "text/plain")),
        ({"output": {"done": True}}, ('{"done":true}', "application/json")),
        ({"output": 0}, ("0", "application/json")),
        ({"output": ""}, ("succeeded", "text/plain")),
        (
            {"status": RunStatus.FAILED, "stop_reason": StopReason.INTERNAL_ERROR, "error": "it broke"},
            ("it broke", "text/plain"),
        ),
        ({"status": RunStatus.FAILED, "stop_reason": StopReason.INTERNAL_ERROR}, ("internal_error", "text/plain")),
    ],
)
def test_a_run_always_says_what_came_of_it(changes: dict[str, Any], said: tuple[str, str]) -> None:
    collected = Collected()
    observer_with(collected).ended(replace(RUN, **{"status": RunStatus.SUCCEEDED, "ended_at": ASKED, **changes}))
    attributes = collected.spans[-1].attributes or {}
    assert (attributes["output.value"], attributes["output.mime_type"]) == said


@pytest.mark.parametrize("result", [None, ""])
def test_a_call_without_a_result_says_what_became_of_it(result: str | None) -> None:
    collected = Collected()
    call = recorded("echo", {"text": "x"}, Effect.READ, ToolState.FAILED)
    step = call.model_copy(update={"result": result})
    observer_with(collected).claimed(RUN).tool_called(step, 0.1)
    attributes = collected.spans[-1].attributes or {}
    assert (attributes["output.value"], attributes["output.mime_type"]) == ("failed", "text/plain")
    assert attributes.get("gen_ai.tool.call.result") == result


def test_of_an_agent_that_is_not_known_nothing_is_shown() -> None:
    collected = Collected()
    gone = replace(
        RUN,
        agent="gone",
        input="a secret",
        status=RunStatus.FAILED,
        stop_reason=StopReason.INTERNAL_ERROR,
        error="a secret",
        ended_at=ASKED,
    )
    observer_with(collected).ended(gone)
    [root] = collected.spans
    assert "a secret" not in root.to_json()
    assert root.status.description == "internal_error"
