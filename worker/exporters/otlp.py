"""Spans as OTLP wants them: the OpenTelemetry Protocol's `ExportTraceServiceRequest`, for one request over HTTP.

OpenTelemetry's own encoder makes the same bytes of them. But it builds every part as a message of its own and copies
that into the next larger one: three times the work, and nearly half of what a span cost. Here each is filled in
where it belongs.
"""

import gzip
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, SpanFlags
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message
from opentelemetry.proto.trace.v1.trace_pb2 import Status as Outcome
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode

logger = logging.getLogger(__name__)

_COMPRESSION = 1
"""The fastest level."""
_KINDS = {
    SpanKind.INTERNAL: Message.SPAN_KIND_INTERNAL,
    SpanKind.SERVER: Message.SPAN_KIND_SERVER,
    SpanKind.CLIENT: Message.SPAN_KIND_CLIENT,
    SpanKind.PRODUCER: Message.SPAN_KIND_PRODUCER,
    SpanKind.CONSUMER: Message.SPAN_KIND_CONSUMER,
}
_STATUSES = {
    StatusCode.UNSET: Outcome.STATUS_CODE_UNSET,
    StatusCode.OK: Outcome.STATUS_CODE_OK,
    StatusCode.ERROR: Outcome.STATUS_CODE_ERROR,
}


class _KeyValues(Protocol):
    """The part of protobuf's repeated fields that is used here."""

    def add(self) -> KeyValue: ...

    def pop(self) -> object: ...


def pack(spans: Sequence[ReadableSpan]) -> tuple[bytes, int]:
    """A compressed request, and how many spans are in it: those that cannot be encoded are left out."""
    request = ExportTraceServiceRequest()
    resources: dict[int, ResourceSpans] = {}
    scopes: dict[tuple[int, int], ScopeSpans] = {}
    packed = 0
    for span in spans:
        place = id(span.resource), id(span.instrumentation_scope)
        if place not in scopes:
            if id(span.resource) not in resources:
                resources[id(span.resource)] = _add_resource(request, span.resource)
            scopes[place] = _add_scope(resources[id(span.resource)], span.instrumentation_scope)
        messages = scopes[place].spans
        try:
            _fill_span(messages.add(), span)
        except ValueError as error:  # half a character in its name or its error
            messages.pop()
            logger.warning("span cannot be encoded", extra={"fields": {"error": type(error).__name__}})
        else:
            packed += 1
    return gzip.compress(request.SerializeToString(), _COMPRESSION), packed


def _add_resource(request: ExportTraceServiceRequest, resource: Resource) -> ResourceSpans:
    message: ResourceSpans = request.resource_spans.add()
    message.resource.SetInParent()
    message.schema_url = resource.schema_url
    _fill_attributes(message.resource.attributes, resource.attributes)
    return message


def _add_scope(resource: ResourceSpans, scope: InstrumentationScope | None) -> ScopeSpans:
    message: ScopeSpans = resource.scope_spans.add()
    message.scope.SetInParent()
    if scope is not None:
        message.schema_url = scope.schema_url or ""
        message.scope.name = scope.name
        message.scope.version = scope.version or ""
        _fill_attributes(message.scope.attributes, scope.attributes)
    return message


def _fill_span(message: Message, span: ReadableSpan) -> None:
    context = span.get_span_context()
    assert context is not None
    message.trace_id, message.span_id = _trace_id(context), _span_id(context)
    message.trace_state = context.trace_state.to_header()
    if span.parent is not None:
        message.parent_span_id = _span_id(span.parent)
    message.flags = _flags(span.parent)
    message.name = span.name
    message.kind = _KINDS[span.kind]
    message.start_time_unix_nano = span.start_time or 0
    message.end_time_unix_nano = span.end_time or 0
    message.status.code = _STATUSES[span.status.status_code]
    message.status.message = span.status.description or ""
    _fill_attributes(message.attributes, span.attributes)
    message.dropped_attributes_count = span.dropped_attributes
    message.dropped_events_count = span.dropped_events
    message.dropped_links_count = span.dropped_links
    for event in span.events:
        _fill_event(message.events.add(), event)
    for link in span.links:
        _fill_link(message.links.add(), link)


def _fill_event(message: Message.Event, event: Event) -> None:
    message.name = event.name
    message.time_unix_nano = event.timestamp
    _fill_attributes(message.attributes, event.attributes)
    message.dropped_attributes_count = event.dropped_attributes


def _fill_link(message: Message.Link, link: Link) -> None:
    message.trace_id, message.span_id = _trace_id(link.context), _span_id(link.context)
    message.flags = _flags(link.context)
    _fill_attributes(message.attributes, link.attributes)
    message.dropped_attributes_count = link.dropped_attributes


def _fill_attributes(messages: _KeyValues, attributes: Mapping[str, object] | None) -> None:
    for name, value in (attributes or {}).items():
        message = messages.add()
        try:
            message.key = name
            _fill_value(message.value, value)
        except ValueError as error:  # an integer of more than 64 bits, for one
            messages.pop()
            fields = {"attribute": name, "error": type(error).__name__}
            logger.warning("attribute cannot be encoded", extra={"fields": fields})


def _fill_value(message: AnyValue, value: object) -> None:
    match value:
        case str():
            message.string_value = value
        case bool():
            message.bool_value = value
        case int():
            message.int_value = value
        case float():
            message.double_value = value
        case bytes():
            message.bytes_value = value
        case Mapping():
            message.kvlist_value.SetInParent()
            _fill_attributes(message.kvlist_value.values, value)
        case Sequence():
            message.array_value.SetInParent()
            for item in value:
                _fill_value(message.array_value.values.add(), item)
        case None:
            message.SetInParent()


def _flags(context: SpanContext | None) -> int:
    """Whether another process is known to have made it, or not to have."""
    flags = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
    if context is not None and context.is_remote:
        return flags | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
    return flags


def _trace_id(context: SpanContext) -> bytes:
    return context.trace_id.to_bytes(16, "big")


def _span_id(context: SpanContext) -> bytes:
    return context.span_id.to_bytes(8, "big")
