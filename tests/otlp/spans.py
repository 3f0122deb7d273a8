"""What a tracing back end was sent: requests, and the spans in them as plain objects."""

import gzip
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class Event:
    """What happened at a moment of a span. `at`: nanoseconds since 1970."""

    name: str
    at: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Link:
    """A span of another trace. Ids in hex digits."""

    trace_id: str
    span_id: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Span:
    """One span as it arrived. Ids in hex digits; `start`, `end`: nanoseconds since 1970; `parent_id` None: a root."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    kind: Literal["unspecified", "internal", "server", "client", "producer", "consumer"]
    start: int
    end: int
    status: Literal["unset", "ok", "error"]
    status_message: str
    attributes: Mapping[str, Any]
    events: Sequence[Event]
    links: Sequence[Link]
    resource: Mapping[str, Any]
    scope: str

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


@dataclass(frozen=True)
class Request:
    """What arrived: header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float = field(default_factory=time.time)

    @property
    def plain(self) -> bytes:
        return gzip.decompress(self.body) if self.headers.get("content-encoding") == "gzip" else self.body


def spans_of(request: Request) -> Iterator[Span]:
    """Those in one request."""
    message = ExportTraceServiceRequest.FromString(request.plain)
    for resource_spans in message.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield _span(span, resource, scope_spans.scope.name)


def _span(span: trace_pb2.Span, resource: Mapping[str, Any], scope: str) -> Span:
    kind = trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower()
    status = trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_").lower()
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        name=span.name,
        kind=kind,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        status=status,
        status_message=span.status.message,
        attributes=_attributes(span.attributes),
        events=[Event(event.name, event.time_unix_nano, _attributes(event.attributes)) for event in span.events],
        links=[Link(link.trace_id.hex(), link.span_id.hex(), _attributes(link.attributes)) for link in span.links],
        resource=resource,
        scope=scope,
    )


def _attributes(pairs: Sequence[KeyValue] | Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    match value.WhichOneof("value"):
        case None:
            return None
        case "array_value":
            return [_value(item) for item in value.array_value.values]
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case plain:
            return getattr(value, plain)
