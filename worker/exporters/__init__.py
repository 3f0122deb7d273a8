"""Sends spans to the tracing back ends, and scores to Langfuse, beside the work and never in its way.

    spans ──► Batcher ──────┬──► Delivery phoenix      each back end has a queue and a thread of its own;
         │                  └──► Delivery datadog …    what goes to several is encoded once
         └──► LangfuseFeed ────► Delivery langfuse     what its SDK makes of spans and scores

Whatever waits is bounded, by number and by bytes. What does not fit is dropped and counted at once, so a back end that
is slow, down or hanging costs memory up to that bound, and nobody's time.
"""

import asyncio
import time
from collections.abc import Sequence
from threading import Thread
from typing import Literal, Protocol
from uuid import UUID

from opentelemetry.sdk.trace import TracerProvider

from app.back_ends import LANGFUSE, back_ends
from app.config import Settings
from worker.exporters.batch import Batcher
from worker.exporters.delivery import Delivery
from worker.metrics import WorkerMetrics

__all__ = ["Exporters", "open_exporters"]

LOOK_SECONDS = 0.01
"""How often it is looked whether everything is sent, while the process waits for that."""


class Feed(Protocol):
    """Puts spans into deliveries."""

    @property
    def is_taking(self) -> bool:
        """False: no delivery would take the next span."""
        ...

    def close(self) -> Thread:
        """Pass on what waits, and end. The thread that does it ends when that is done."""
        ...

    def give_up(self) -> None:
        """Count what still waits as lost."""
        ...


class LangfuseScores(Protocol):
    """Takes judgements about runs."""

    def score(self, run_id: UUID, name: str, value: float | str, *, kind: str, comment: str | None) -> None: ...


class Exporters:
    """All back ends of this process. Nothing here raises or waits for a back end."""

    def __init__(
        self, deliveries: Sequence[Delivery], feeds: Sequence[Feed], langfuse: LangfuseScores | None = None
    ) -> None:
        self._deliveries = deliveries
        self._feeds = feeds
        self._langfuse = langfuse

    def score(
        self,
        run_id: UUID,
        name: str,
        value: float | str,
        *,
        kind: Literal["BOOLEAN", "CATEGORICAL", "NUMERIC"],
        comment: str | None = None,
    ) -> None:
        """A judgement about a run, beside its trace, where a back end keeps some: only Langfuse does."""
        if self._langfuse is not None:
            self._langfuse.score(run_id, name, value, kind=kind, comment=comment)

    def skip(self) -> bool:
        """Need the next span not be made, because no back end would take it? Then it is counted as lost here."""
        if any(feed.is_taking for feed in self._feeds):
            return False
        for delivery in self._deliveries:
            delivery.refuse(1)
        return True

    async def close(self, seconds: float) -> None:
        """Send what waits, for so long; what is left then is lost and counted. To be called once."""
        until = time.monotonic() + seconds
        await _joined([feed.close() for feed in self._feeds], until)
        for feed in self._feeds:
            feed.give_up()
        await _joined([delivery.close() for delivery in self._deliveries], until)
        for delivery in self._deliveries:
            delivery.give_up()


def open_exporters(settings: Settings, provider: TracerProvider, metrics: WorkerMetrics) -> Exporters:
    """Give the provider's spans to every back end that the settings name."""
    deliveries = {back_end.name: Delivery(back_end, metrics) for back_end in back_ends(settings)}
    metrics.watch_back_ends(deliveries)
    feeds: list[Feed] = []
    plain = [delivery for name, delivery in deliveries.items() if name != LANGFUSE]
    if plain:
        batcher = Batcher(plain)
        provider.add_span_processor(batcher)
        feeds.append(batcher)
    langfuse = None
    if LANGFUSE in deliveries:
        from worker.exporters.langfuse import LangfuseFeed  # noqa: PLC0415 - half a second and 30 MB

        langfuse = LangfuseFeed(settings, deliveries[LANGFUSE])
        provider.add_span_processor(langfuse)
        feeds.append(langfuse)
    return Exporters(tuple(deliveries.values()), feeds, langfuse)


async def _joined(threads: Sequence[Thread], until: float) -> None:
    # A thread that ends sets no event of this loop.
    while any(thread.is_alive() for thread in threads) and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_SECONDS)
