"""Requests that wait for a run to come to rest. They hold an event each, and no database connection."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID


class Waiters:
    """Who waits for which run. `wake` is called for every run of which Redis says that it rests."""

    def __init__(self) -> None:
        self._events: dict[UUID, set[asyncio.Event]] = {}

    def wake(self, run_id: UUID) -> None:
        for event in self._events.get(run_id, ()):
            event.set()

    @contextmanager
    def waiting_for(self, run_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set whenever the run comes to rest. Clear it before you look at the database."""
        event = asyncio.Event()
        self._events.setdefault(run_id, set()).add(event)
        try:
            yield event
        finally:
            events = self._events[run_id]
            events.discard(event)
            if not events:
                del self._events[run_id]
