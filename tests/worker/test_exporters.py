"""What tracing back ends are sent, and what becomes of spans that they do not take. Each is a server over loopback."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID, uuid4

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from prometheus_client import CollectorRegistry

from app.back_ends import BackEnd as Known
from app.config import Settings, load_settings
from tests import otlp
from tests.otlp import Kind, Mode, receiver
from worker import semconv
from worker.exporters import Exporters, open_exporters
from worker.exporters.batch import BATCH_SPANS, MOST_SPANS, Batcher
from worker.exporters.delivery import ATTEMPT_SECONDS, MOST_BYTES, MOST_ITEMS, Delivery
from worker.metrics import WorkerMetrics

QUICK = 0.4
"""Seconds that an attempt may take here."""


class Ids(RandomIdGenerator):
    """Roots have the trace id that is set."""

    trace_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id


class Rig:
    """A provider whose spans go to `exporters`, and what was counted."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = WorkerMetrics(self.registry, {}, model=None)
        self._ids = Ids()
        self.provider = TracerProvider(sampler=ALWAYS_ON, id_generator=self._ids, shutdown_on_exit=False)
        self._tracer = self.provider.get_tracer("agent-service")
        self.exporters = Exporters((), ())
        self.names: list[str] = []

    def open(self, settings: Settings) -> "Rig":
        self.exporters = open_exporters(settings, self.provider, self.metrics)
        return self

    def open_quick(self, *back_ends: otlp.BackEnd, pauses: tuple[float, ...] = (0.05, 0.1)) -> "Rig":
        """The same parts, less patient."""
        deliveries = [
            Delivery(
                Known(back_end.kind, f"{back_end.address}{back_end.front.traces_path}", back_end.front.headers),
                self.metrics,
                attempt_seconds=QUICK,
                pauses=pauses,
            )
            for back_end in back_ends
        ]
        batcher = Batcher(deliveries, seconds=0.1)
        self.provider.add_span_processor(batcher)
        self.exporters = Exporters(deliveries, [batcher])
        return self

    def trace(self, spans: int, *, text: str = "", name: str = "chat model", run_id: UUID | None = None) -> UUID:
        """So many spans below a root, which comes last, as of a run."""
        run_id = run_id or uuid4()
        parent = SpanContext(run_id.int, run_id.int & 0xFFFF, is_remote=True, trace_flags=TraceFlags(1))
        below = set_span_in_context(NonRecordingSpan(parent), Context())
        for number in range(spans):
            attributes: dict[str, str | int] = {
                "gen_ai.operation.name": "chat",
                "gen_ai.input.messages": text,
                "number": number,
            }
            self._tracer.start_span(name, below, attributes=attributes, start_time=1).end(2)
        self._ids.trace_id = run_id.int
        self._tracer.start_span("invoke_agent support", Context(), start_time=1).end(3)
        return run_id

    def sent(self, back_end: str) -> int:
        return self._count("agent_service_telemetry_sent_total", back_end=back_end)

    def lost(self, back_end: str, reason: str | None = None) -> int:
        reasons = [reason] if reason else ["queue_full", "failed", "ended"]
        return sum(
            self._count("agent_service_telemetry_dropped_total", back_end=back_end, reason=reason) for reason in reasons
        )

    def close(self, seconds: float = 5.0) -> float:
        """How long it took."""
        began = time.monotonic()
        asyncio.run(self.exporters.close(seconds))
        return time.monotonic() - began

    def _count(self, name: str, **labels: str) -> int:
        return int(self.registry.get_sample_value(name, labels) or 0)


@contextmanager
def environment(**variables: str) -> Iterator[Settings]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", "postgresql://db/agents")
        patch.setenv("REDIS_URL", "redis://redis/0")
        for name, value in variables.items():
            patch.setenv(name, value)
        yield load_settings()


def until(condition: Callable[[], object], *, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.01)


@dataclass(frozen=True)
class All:
    """All back ends at once, and what a run with scores left in them."""

    receivers: dict[Kind, otlp.BackEnd]
    rig: Rig
    run_id: UUID
    environment_before: dict[str, str]
    environment_after: dict[str, str]


@pytest.fixture(scope="module")
def everything() -> Iterator[All]:
    with otlp.all_four() as four, receiver("collector") as collector:
        receivers: dict[Kind, otlp.BackEnd] = {**four, collector.kind: collector}
        # What is not ours in the environment must not reach the SDKs; what is there stays there.
        foreign = {
            "LANGFUSE_TRACING_ENABLED": "false",
            "OTEL_BSP_MAX_QUEUE_SIZE": "1",
            "OTEL_EXPORTER_OTLP_HEADERS": "x=1",
        }
        with environment(**otlp.settings_of(receivers), **foreign) as settings:
            before = dict(os.environ)
            rig = Rig().open(settings)
            after = dict(os.environ)
            run_id = rig.trace(30, text="data:image/png;base64,AAAA")
            rig.exporters.score(run_id, "succeeded", 1.0, kind="BOOLEAN")
            rig.exporters.score(run_id, "human_decision", "approve", kind="CATEGORICAL", comment="fine")
            rig.exporters.score(run_id, "quality", 0.7, kind="NUMERIC")
            took = rig.close()
        assert took < 4
        yield All(receivers, rig, run_id, before, after)


@pytest.mark.parametrize("kind", [*otlp.KINDS, "collector"])
def test_every_back_end_is_given_the_same_whole_trace(everything: All, kind: Kind) -> None:
    spans = everything.receivers[kind].spans(everything.run_id)
    assert sorted(span.attributes["number"] for span in spans if span.parent_id) == list(range(30))
    (root,) = [span for span in spans if span.parent_id is None]
    assert (root.name, root.trace_id) == ("invoke_agent support", everything.run_id.hex)
    # Nothing is taken out of texts, or uploaded beside the trace (the receiver would complain).
    assert {span.attributes["gen_ai.input.messages"] for span in spans if span is not root} == {
        "data:image/png;base64,AAAA"
    }


def test_the_root_is_marked_as_langfuses_sdk_would() -> None:
    from langfuse import LangfuseOtelSpanAttributes

    assert LangfuseOtelSpanAttributes.IS_APP_ROOT == semconv.LANGFUSE_IS_ROOT


def test_langfuse_is_given_the_scores(everything: All) -> None:
    scores = {score["name"]: score for score in everything.receivers["langfuse"].scores(everything.run_id)}
    assert {name: (score["dataType"], score["value"]) for name, score in scores.items()} == {
        "succeeded": ("BOOLEAN", 1),
        "human_decision": ("CATEGORICAL", "approve"),
        "quality": ("NUMERIC", 0.7),
    }
    assert scores["human_decision"]["comment"] == "fine"
    assert {score["environment"] for score in scores.values()} == {"development"}


def test_what_was_taken_is_counted(everything: All) -> None:
    collector = everything.receivers["collector"]
    sent = {name: everything.rig.sent(name) for name in (*otlp.KINDS, f"127.0.0.1:{collector.port}")}
    assert sent == {**dict.fromkeys(sent, 31), "langfuse": 31 + 3}
    assert not any(everything.rig.lost(name) for name in sent)


def test_nothing_global_is_touched(everything: All) -> None:
    assert trace._TRACER_PROVIDER is None
    assert everything.environment_after == everything.environment_before


def test_without_back_ends_nothing_of_theirs_is_loaded() -> None:
    loaded = """import sys, worker.main
found = [name for name in ("langfuse", "opentelemetry", "httpx") if name in sys.modules]
sys.exit(str(found) if found else 0)"""
    subprocess.run([sys.executable, "-c", loaded], check=True)


@pytest.mark.parametrize(
    "mode", [Mode.REFUSE, Mode.BROKEN, Mode.REDIRECT, Mode.RESET, Mode.GARBAGE, Mode.HANG, Mode.TRICKLE]
)
def test_what_a_back_end_does_not_take_is_counted_and_no_other_waits_for_it(mode: Mode) -> None:
    with receiver("phoenix", mode=mode) as bad, receiver("langsmith") as good:
        rig = Rig().open_quick(bad, good)
        run_id = rig.trace(9)
        good.until(run_id, 10, seconds=5)
        until(lambda: rig.lost("phoenix") == 10)
        assert (rig.lost("phoenix", "failed"), rig.sent("phoenix")) == (10, 0)
        until(lambda: rig.sent("langsmith") == 10)
        assert rig.lost("langsmith") == 0
        assert bad.spans() == []

        bad.mode = Mode.OK
        later = rig.trace(9)
        bad.until(later, 10)
        assert rig.close() < 4
        assert (rig.sent("phoenix"), rig.lost("phoenix")) == (10, 10)


def test_a_back_end_that_is_down_is_given_what_comes_after_it_is_back() -> None:
    with receiver("phoenix") as back_end:
        rig = Rig().open_quick(back_end)
        first = rig.trace(1)
        back_end.until(first, 2)
        with back_end.down():
            rig.trace(9)
            until(lambda: rig.lost("phoenix", "failed") == 10)
        later = rig.trace(1)
        back_end.until(later, 2)
        rig.close()
        assert (rig.sent("phoenix"), rig.lost("phoenix")) == (4, 10)


def test_for_a_back_end_that_takes_nothing_spans_need_not_be_made_until_it_is_back() -> None:
    with receiver("phoenix", mode=Mode.HANG) as bad, receiver("langsmith") as good:
        alone, both = Rig().open_quick(bad), Rig().open_quick(bad, good)
        for rig in (alone, both):
            assert not rig.exporters.skip()
            for _ in range(6):  # one to fail, and some that wait
                rig.trace(BATCH_SPANS - 1)
            until(lambda rig=rig: rig.lost("phoenix", "failed"))  # type: ignore[misc]
        assert not both.exporters.skip()
        alone.trace(BATCH_SPANS - 1)
        until(lambda: alone.lost("phoenix", "queue_full") >= BATCH_SPANS)
        lost = alone.lost("phoenix")
        assert alone.exporters.skip()
        assert alone.lost("phoenix") > lost

        bad.mode = Mode.OK
        until(lambda: not alone.exporters.skip())
        later = alone.trace(9)
        bad.until(later, 10)
        alone.close()
        both.close()


def test_a_short_outage_loses_nothing() -> None:
    with receiver("phoenix") as back_end:
        rig = Rig().open_quick(back_end, pauses=(0.1, 3.0))
        with back_end.down():
            run_id = rig.trace(9)
            time.sleep(1.5)
        back_end.until(run_id, 10)
        rig.close()
        assert (rig.sent("phoenix"), rig.lost("phoenix")) == (10, 0)


def test_a_busy_back_end_is_asked_again_when_it_says() -> None:
    with receiver("phoenix", mode=Mode.BUSY) as back_end:
        rig = Rig().open_quick(back_end, pauses=(0.0, 0.0))
        run_id = rig.trace(9)
        back_end.until_requests(1)
        back_end.mode = Mode.OK
        back_end.until(run_id, 10)
        first, second = (request.at for request in back_end.requests)
        assert second - first > 0.9 * otlp.RETRY_AFTER_SECONDS
        rig.close()
        assert (rig.sent("phoenix"), rig.lost("phoenix")) == (10, 0)


def test_a_process_that_ends_makes_no_pause_between_attempts() -> None:
    with receiver("phoenix", mode=Mode.BROKEN) as back_end:
        rig = Rig().open_quick(back_end, pauses=(60.0, 60.0))
        rig.trace(9)
        back_end.until_requests(1)
        assert rig.close() < 3
        assert len(back_end.requests) == 3
        assert rig.lost("phoenix", "failed") == 10


def test_a_refusal_is_not_asked_again() -> None:
    with receiver("phoenix", mode=Mode.REFUSE) as back_end:
        rig = Rig().open_quick(back_end)
        rig.trace(9)
        rig.close()
        assert len(back_end.requests) == 1


def test_what_a_back_end_takes_only_partly_is_counted_so() -> None:
    with receiver("langfuse", mode=Mode.PARTIAL) as langfuse, environment(**langfuse.settings) as settings:
        rig = Rig().open(settings)
        run_id = rig.trace(9)
        until(lambda: rig.sent("langfuse") == 9)
        rig.exporters.score(run_id, "first", 1.0, kind="NUMERIC")
        rig.exporters.score(run_id, "second", 1.0, kind="NUMERIC")
        rig.close()
        assert (rig.sent("langfuse"), rig.lost("langfuse", "failed")) == (9 + 1, 1 + 1)


@pytest.mark.parametrize("kind", ["langfuse", "phoenix"])
def test_a_back_end_that_hangs_costs_nothing_but_what_it_would_have_been_given(kind: Kind) -> None:
    """Nobody waits; what waits is bounded; and all that is lost is counted, to the span."""
    spans, inside = 12_000, MOST_ITEMS + max(MOST_SPANS, 2_000)
    with receiver(kind, mode=Mode.HANG) as back_end, environment(**back_end.settings) as settings:
        rig = Rig().open(settings)
        slowest = 0.0
        for _ in range(spans // 10):
            began = time.monotonic()
            rig.trace(9)
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 0.2 * ATTEMPT_SECONDS
        assert spans - inside <= rig.lost(kind, "queue_full") < spans
        rig.exporters.score(uuid4(), "succeeded", 1.0, kind="BOOLEAN")
        scores = int(kind == "langfuse")

        assert 0.4 < rig.close(0.5) < 1.0
        assert rig.sent(kind) == 0
        assert rig.lost(kind, "queue_full") + rig.lost(kind, "ended") == spans + scores
        assert rig.lost(kind, "ended") > 0

        rig.trace(9)
        rig.exporters.score(uuid4(), "succeeded", 1.0, kind="BOOLEAN")
        assert rig.lost(kind) == spans + 10 + 2 * scores


@pytest.mark.parametrize("kind", ["langfuse", "phoenix"])
def test_what_waits_is_bounded_by_its_size_too(kind: Kind) -> None:
    with receiver(kind, mode=Mode.HANG) as back_end, environment(**back_end.settings) as settings:
        rig = Rig().open(settings)
        rig.trace(45, text="x" * 1_000_000)
        # What fits into the two queues, one after the other, and a batch on its way from one to the other.
        assert rig.lost(kind, "queue_full") >= 46 - 2 * MOST_BYTES // 1_000_000 - 4
        rig.close(0.2)
        assert rig.lost(kind) == 46


@pytest.mark.parametrize("kind", ["langfuse", "phoenix"])
def test_what_has_been_taken_makes_room_again(kind: Kind) -> None:
    with receiver(kind) as back_end, environment(**back_end.settings) as settings:
        rig = Rig().open(settings)
        for number, (spans, text) in enumerate([(9, "x" * 1_000_000)] * 3 + [(1_700, "")] * 3, 1):
            rig.trace(spans, text=text)
            sent = 10 * min(number, 3) + 1_701 * max(0, number - 3)
            until(lambda sent=sent: rig.sent(kind) == sent)  # type: ignore[misc]
        rig.close()
        assert rig.lost(kind) == 0


@pytest.mark.parametrize("kind", ["langfuse", "phoenix"])
def test_what_has_no_time_at_the_end_is_counted(kind: Kind) -> None:
    with receiver(kind) as back_end, environment(**back_end.settings) as settings:
        rig = Rig().open(settings)
        rig.trace(999)
        rig.close(0)
        assert rig.lost(kind, "ended") > 0
        assert rig.sent(kind) + rig.lost(kind) == 1_000


def test_a_span_that_cannot_be_written_takes_no_other_with_it() -> None:
    with receiver("phoenix") as back_end:
        rig = Rig().open_quick(back_end)
        run_id = uuid4()
        rig.trace(1, name="execute_tool \ud800", run_id=run_id)
        rig.close()
        assert [span.name for span in back_end.spans(run_id)] == ["invoke_agent support"]
        assert (rig.sent("phoenix"), rig.lost("phoenix", "failed")) == (1, 1)


def test_many_spans_travel_in_few_requests_of_bounded_size() -> None:
    with receiver("phoenix") as back_end:
        rig = Rig().open_quick(back_end)
        for text in ("", "x" * 100_000):
            rig.trace(600 if not text else 40, text=text)
            until(lambda: rig.sent("phoenix") in (601, 642))
        rig.close()
        assert len(back_end.spans()) == 601 + 41
        assert len(back_end.requests) <= 3 + 5 + 2
        assert max(len(list(otlp.spans_of(request))) for request in back_end.requests) <= BATCH_SPANS
        assert max(len(request.plain) for request in back_end.requests) < 1_300_000


def test_losses_are_logged_once_a_minute_without_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    with receiver("langsmith", mode=Mode.REFUSE) as back_end:
        rig = Rig().open_quick(back_end)
        for lost in (1, 2, 3):
            rig.trace(0)
            until(lambda lost=lost: rig.lost("langsmith") == lost)  # type: ignore[misc]
        rig.close()
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert vars(record)["fields"] == {"back_end": "langsmith", "reason": "failed", "error": "HTTP 401", "lost": 1}
    assert back_end.front.headers["x-api-key"] not in caplog.text


def test_a_process_that_ends_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    with receiver("langfuse") as langfuse, receiver("phoenix") as phoenix:
        with environment(**langfuse.settings, **phoenix.settings) as settings:
            rig = Rig().open(settings)
            rig.trace(9)
            rig.close()
        until(
            lambda: not [thread for thread in set(threading.enumerate()) - before if "telemetry" in thread.name],
        )


def test_a_proxy_of_the_environment_is_used_but_for_what_it_is_not_meant_for() -> None:
    with receiver("phoenix") as back_end, environment(**back_end.settings) as settings:
        for bypass, requests in (("", 0), ("127.0.0.1", 1)):
            with environment(http_proxy="http://127.0.0.1:9", no_proxy=bypass):
                rig = Rig().open(settings)
                rig.trace(0)
                rig.close()
            assert len(back_end.requests) == requests
