"""The external ledger: where the effects of the fault suite's tools land, and what they are counted by.

A small HTTP server in the test's process. The service can only call it, as it would call a bank; nothing it does to
Postgres or Redis changes what is written here.
"""

import asyncio
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from aiohttp import web

from app.devstack.ports import LOOPBACK, free_port


@dataclass(frozen=True, slots=True)
class Entry:
    """One call that arrived. `call`: which call of which run it stands for, as the tool was told by the model."""

    kind: str
    run: str
    call: str
    key: str


@dataclass
class Ledger:
    """Takes `POST /{kind}` with `{"run", "call", "key"}`. A key of kind `put` is applied once, as a bank would."""

    port: int = field(default_factory=free_port)
    entries: list[Entry] = field(default_factory=list)
    _known: set[tuple[str, str]] = field(default_factory=set)

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def arrivals(self, kind: str) -> Counter[str]:
        """How often each key of this kind has arrived."""
        return Counter(entry.key for entry in list(self.entries) if entry.kind == kind)

    def keys_of_calls(self, kind: str) -> dict[tuple[str, str], set[str]]:
        """(run, call) → the keys under which it arrived."""
        keys: dict[tuple[str, str], set[str]] = {}
        for entry in list(self.entries):
            if entry.kind == kind:
                keys.setdefault((entry.run, entry.call), set()).add(entry.key)
        return keys

    async def _take(self, request: web.Request) -> web.Response:
        entry = Entry(kind=request.match_info["kind"], **await request.json())
        is_new = (entry.kind, entry.key) not in self._known
        self._known.add((entry.kind, entry.key))
        self.entries.append(entry)
        return web.json_response({"entry": f"{entry.kind} {entry.call}", "is_new": is_new})

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        async def serve() -> None:
            app = web.Application()
            app.router.add_post("/{kind}", self._take)
            self._runner = web.AppRunner(app, access_log=None)
            await self._runner.setup()
            await web.TCPSite(self._runner, LOOPBACK, self.port).start()
            started.set()

        def run() -> None:
            self._loop.run_until_complete(serve())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, name="ledger", daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
