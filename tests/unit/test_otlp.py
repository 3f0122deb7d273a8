"""Spans are written as OpenTelemetry's own encoder would write them."""

import gzip

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import AttributeValue

from worker.exporters.otlp import pack

CONTEXT = SpanContext(2**127 + 5, 2**63 + 7, is_remote=True, trace_flags=TraceFlags(1))
LOCAL = SpanContext(9, 8, is_remote=False, trace_flags=TraceFlags(1), trace_state=TraceState([("a", "1"), ("b", "2")]))
ATTRIBUTES: dict[str, AttributeValue] = {
    "text": "naïve \N{SNOWMAN} 😀",
    "empty": "",
    "true": True,
    "false": False,
    "nought": 0,
    "number": -(2**63),
    "fraction": 0.1,
    "texts": ("a", "b"),
    "numbers": (1, 2),
    "nothing in it": (),
    "bytes": b"\0\xff",
    "mapping": {"a": {"b": [1, "x", None]}, "empty": {}},
    "none": None,
}
SPANS = {
    "bare": ReadableSpan("bare", context=CONTEXT, resource=Resource({})),
    "full": ReadableSpan(
        "full",
        context=LOCAL,
        parent=CONTEXT,
        resource=Resource({"service.name": "x", "list": ("a",)}, schema_url="https://resource.example/1"),
        attributes=ATTRIBUTES,
        events=[Event("one", ATTRIBUTES, timestamp=3), Event("two", timestamp=4)],
        links=[Link(CONTEXT, ATTRIBUTES), Link(LOCAL)],
        kind=SpanKind.CLIENT,
        status=Status(StatusCode.ERROR, "it broke"),
        start_time=1,
        end_time=2**63,
        instrumentation_scope=InstrumentationScope("scope", "1", "https://scope.example/1", {"of": "scope"}),
    ),
    "with a local parent": ReadableSpan("x", context=CONTEXT, parent=LOCAL, resource=Resource({"a": 1})),
    **{kind.name: ReadableSpan("x", context=CONTEXT, resource=Resource({}), kind=kind) for kind in SpanKind},
    **{code.name: ReadableSpan("x", CONTEXT, resource=Resource({}), status=Status(code)) for code in StatusCode},
}


def written(*spans: ReadableSpan) -> ExportTraceServiceRequest:
    body, packed = pack(spans)
    assert packed == len(spans)
    return request_in(body)


def request_in(body: bytes) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    request.ParseFromString(gzip.decompress(body))
    return request


@pytest.mark.parametrize("name", SPANS)
def test_a_span_is_written_as_the_library_does(name: str) -> None:
    request = written(SPANS[name])
    assert request == encode_spans([SPANS[name]])
    assert request.SerializeToString() == encode_spans([SPANS[name]]).SerializeToString()


def test_spans_of_several_tracers_are_written_as_the_library_does() -> None:
    seen = InMemorySpanExporter()
    provider = TracerProvider(
        resource=Resource({"service.name": "x"}),
        span_limits=SpanLimits(max_attributes=1, max_events=1, max_links=1),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(SimpleSpanProcessor(seen))
    for name in ("one", "another", "one"):
        tracer = provider.get_tracer(name)
        with tracer.start_as_current_span(
            "outer", attributes={"a": 1, "dropped": 2}, links=[Link(CONTEXT)] * 2
        ) as outer:
            outer.add_event("first")
            outer.add_event("second", {"b": 1})
            tracer.start_span("inner").end()
    spans = seen.get_finished_spans()
    assert {(span.dropped_attributes, span.dropped_events, span.dropped_links) for span in spans} == {
        (0, 0, 0),
        (1, 1, 1),
    }
    assert written(*spans) == encode_spans(spans)


def test_what_cannot_be_written_is_left_out_alone() -> None:
    resource = Resource({})
    odd: dict[str, AttributeValue] = {"huge": 2**70, "half": "\ud800", "in a list": ("\ud800",), "x": 1, "\ud800": 1}
    broken = ReadableSpan("execute_tool \ud800", context=CONTEXT, resource=resource)
    fine = ReadableSpan("fine", context=CONTEXT, resource=resource, attributes=odd)
    body, packed = pack([broken, fine, broken])
    (place,) = request_in(body).resource_spans[0].scope_spans
    assert (packed, [span.name for span in place.spans]) == (1, ["fine"])
    assert [attribute.key for attribute in place.spans[0].attributes] == ["x"]
