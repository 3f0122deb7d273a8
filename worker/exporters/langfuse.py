"""Langfuse, by its SDK: that decides what it wants of a span, and how a score is written.

The SDK's own way out is a queue that drops without a word, clients with retries of their own, and a `flush` that can
take half a minute. So what it hands to its exporter and to its HTTP client goes into a delivery of ours, which takes
it at once: its queues stay empty, and its `flush` has nothing to wait for.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from uuid import UUID

import httpx
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from app.config import Settings
from worker.exporters.batch import Batch, weight
from worker.exporters.delivery import Delivery, Parcel
from worker.exporters.room import Room
from worker.metrics import Drop

MOST_ITEMS = 2_000
"""What may be inside of the SDK: its queue of spans drops what is beyond 2,048."""
MOST_BYTES = 16 * 1024 * 1024
BATCH_ITEMS = 256
BATCH_SECONDS = 1.0
_NOT_PASSED_ON = frozenset({"accept-encoding", "connection", "content-length", "host", "transfer-encoding"})
_SCORES = "/api/public/scores"


class LangfuseFeed(SpanProcessor):
    """Gives spans and scores to the SDK, and what it makes of them to the delivery."""

    def __init__(self, settings: Settings, delivery: Delivery) -> None:
        assert settings.langfuse_secret_key is not None
        self._delivery = delivery
        self._room = Room(MOST_ITEMS, MOST_BYTES)
        self._sdk = _Provider()
        with _quiet_environment():
            from langfuse import Langfuse  # noqa: PLC0415 - it reads the environment when it is imported, too

            self._client = Langfuse(
                public_key=settings.langfuse_public_key,
                secret_key=settings.langfuse_secret_key.get_secret_value(),
                base_url=settings.langfuse_host.rstrip("/"),
                environment=settings.environment,
                tracer_provider=self._sdk,
                span_exporter=_Exporter(delivery, self._room),
                httpx_client=httpx.Client(transport=_Outbox(delivery, self._room)),
                should_export_span=lambda span: True,
                flush_at=BATCH_ITEMS,
                flush_interval=BATCH_SECONDS,
                sample_rate=1.0,
            )
        logging.getLogger("httpx").handlers.clear()  # the SDK puts one there, which writes lines that are no JSON

    @property
    def is_taking(self) -> bool:
        """False: what comes now is dropped. Asked before the SDK is, so that a back end that hangs does not cost its
        work."""
        return self._delivery.is_taking(self._room.items)

    def on_end(self, span: ReadableSpan) -> None:
        if not self.is_taking or not self._room.take(1, weight(span)):
            self._delivery.lose(1, self._room.refusal)
            return
        for processor in self._sdk.processors:
            processor.on_end(span)

    def score(self, run_id: UUID, name: str, value: float | str, *, kind: str, comment: str | None) -> None:
        """See `Exporters.score`."""
        if not self.is_taking or not self._room.take(1, 0):
            self._delivery.lose(1, self._room.refusal)
            return
        self._client.create_score(
            trace_id=run_id.hex,
            name=name,
            value=cast(Any, value),  # one overload for each kind
            data_type=cast(Any, kind),
            comment=comment,
        )

    def close(self) -> threading.Thread:
        thread = threading.Thread(target=self._flush, name="telemetry langfuse flush", daemon=True)
        thread.start()
        return thread

    def give_up(self) -> None:
        self._delivery.lose(self._room.close(), Drop.ENDED)

    def _flush(self) -> None:
        self._client.shutdown()
        self._sdk.shutdown()


class _Provider(TracerProvider):
    """Makes no spans: it is where the SDK puts its span processor, so that we can stand before it."""

    def __init__(self) -> None:
        super().__init__(sampler=ALWAYS_ON, shutdown_on_exit=False)
        self.processors: list[SpanProcessor] = []

    def add_span_processor(self, span_processor: SpanProcessor) -> None:
        self.processors.append(span_processor)
        super().add_span_processor(span_processor)


class _Exporter(SpanExporter):
    """What the SDK's span processor believes to be its connection."""

    def __init__(self, delivery: Delivery, room: Room) -> None:
        self._delivery = delivery
        self._room = room

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        batch = Batch(spans, sum(map(weight, spans)))
        if self._room.leave(batch.items, batch.size):
            self._delivery.offer_spans(batch)
        return SpanExportResult.SUCCESS


class _Outbox(httpx.BaseTransport):
    """What the SDK's HTTP client believes to be its connection. It sends nothing but scores."""

    def __init__(self, delivery: Delivery, room: Room) -> None:
        self._delivery = delivery
        self._room = room

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith(_SCORES):
            scores = _Scores(request.read())
            if self._room.leave(scores.items, 0):
                headers = {name: value for name, value in request.headers.items() if name not in _NOT_PASSED_ON}
                self._delivery.offer(Parcel(str(request.url), headers, scores))
            return httpx.Response(202, json={"message": "Accepted"})
        return httpx.Response(404)


class _Scores:
    """A request with scores, as the SDK has written it."""

    def __init__(self, body: bytes) -> None:
        self.items = len(json.loads(body))
        self.size = len(body)
        self._body = body

    def pack(self) -> tuple[bytes, int]:
        return self._body, self.items


@contextmanager
def _quiet_environment() -> Iterator[None]:
    """Settings that are not ours do not count, and images inside of texts are not uploaded (for which there is no
    parameter): while the SDK is being set up, in a process that does nothing else yet."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(("LANGFUSE_", "OTEL_"))}
    for name in hidden:
        del os.environ[name]
    os.environ["LANGFUSE_MEDIA_UPLOAD_ENABLED"] = "false"
    try:
        yield
    finally:
        del os.environ["LANGFUSE_MEDIA_UPLOAD_ENABLED"]
        os.environ.update(hidden)
