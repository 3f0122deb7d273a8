"""Spans on their way: collected for a moment, and encoded once, by whichever back end is the first to send them."""

import threading
from collections import deque
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

from worker.exporters.delivery import Delivery
from worker.exporters.otlp import pack
from worker.exporters.room import Room
from worker.metrics import Drop

MOST_SPANS = 4_096
MOST_BYTES = 16 * 1024 * 1024
"""What may wait for others to travel with."""
BATCH_SPANS = 256
BATCH_BYTES = 1024 * 1024
"""A batch ends with the span that goes beyond this."""
BATCH_SECONDS = 1.0
_SPAN_BYTES = 500
"""Of a span, beside the text in its attributes; roughly."""


class Batch:
    """Spans for one request, to as many back ends as there are. `size`: about how many bytes they take while they wait.

    They are encoded when a back end is ready to take them: for one that hangs, that is hardly ever.
    """

    def __init__(self, spans: Sequence[ReadableSpan], size: int) -> None:
        self.items = len(spans)
        self.size = size
        self._spans = spans
        self._packed: tuple[bytes, int] | None = None
        self._lock = threading.Lock()

    def pack(self) -> tuple[bytes, int]:
        """A compressed OTLP request, and how many spans are in it: those that cannot be encoded are left out."""
        with self._lock:
            if self._packed is None:
                self._packed = pack(self._spans)
                self._spans = ()
            return self._packed


class Batcher(SpanProcessor):
    """Gives every span that ends to all of these back ends. `seconds`: how long it waits for others."""

    def __init__(self, deliveries: Sequence[Delivery], *, seconds: float = BATCH_SECONDS) -> None:
        self._deliveries = deliveries
        self._seconds = seconds
        self._waiting: deque[tuple[ReadableSpan, int]] = deque()
        self._room = Room(MOST_SPANS, MOST_BYTES)
        self._wake = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="telemetry batches", daemon=True)
        self._thread.start()

    @property
    def is_taking(self) -> bool:
        """False: nobody would take the next span."""
        return any(delivery.is_taking(self._room.items) for delivery in self._deliveries)

    def on_end(self, span: ReadableSpan) -> None:
        """Called by whoever ends a span; takes it, or drops it, at once."""
        size = weight(span)
        if not self._room.take(1, size):
            self._lose(1, self._room.refusal)
            return
        self._waiting.append((span, size))
        if self._room.items >= BATCH_SPANS and not self._wake.is_set():
            self._wake.set()

    def close(self) -> threading.Thread:
        self._is_closing = True
        self._wake.set()
        return self._thread

    def give_up(self) -> None:
        self._lose(self._room.close(), Drop.ENDED)

    def _work(self) -> None:
        is_last = False
        while not is_last:
            self._wake.wait(self._seconds)
            self._wake.clear()
            is_last = self._is_closing
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            batch = self._next_batch()
            if self._room.leave(batch.items, batch.size):
                for delivery in self._deliveries:
                    delivery.offer_spans(batch)

    def _next_batch(self) -> Batch:
        spans: list[ReadableSpan] = []
        size = 0
        while self._waiting and len(spans) < BATCH_SPANS and size < BATCH_BYTES:
            span, its_size = self._waiting.popleft()
            spans.append(span)
            size += its_size
        return Batch(spans, size)

    def _lose(self, spans: int, reason: Drop) -> None:
        for delivery in self._deliveries:
            delivery.lose(spans, reason)


def weight(span: ReadableSpan) -> int:
    """About how many bytes it takes while it waits."""
    return _SPAN_BYTES + sum([len(value) for value in (span.attributes or {}).values() if isinstance(value, str)])
