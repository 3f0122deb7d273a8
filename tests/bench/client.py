"""A client that costs little, because it shares the cores with what it measures."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import aiohttp

Json = dict[str, Any]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Client:
    """Talks to the API and keeps how long each kind of request took (milliseconds)."""

    address: str
    key: str
    took: dict[str, list[float]] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            self.address,
            headers={"Authorization": f"Bearer {self.key}"},
            connector=aiohttp.TCPConnector(limit=0),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def submit(self, agent: str, text: str) -> Json:
        return await self._timed("accept", "POST", "/v1/runs", json={"agent": agent, "input": text})

    async def get(self, run_id: str) -> Json:
        return await self._timed("poll", "GET", f"/v1/runs/{run_id}")

    async def first_page(self) -> Json:
        return await self._timed("list", "GET", "/v1/runs")

    async def wait(self, run_id: str) -> Json:
        """Poll, as a client should, until the run has ended."""
        while True:
            run = await self._request("GET", f"/v1/runs/{run_id}?wait=30")
            if run["ended_at"]:
                return run

    async def until_first_call(self, run: Json) -> float:
        """Milliseconds from the accepting commit to the first model call."""
        steps = (await self._request("GET", f"/v1/runs/{run['id']}/steps"))["data"]
        first = steps[0]
        waited = datetime.fromisoformat(first["recorded_at"]) - datetime.fromisoformat(run["created_at"])
        return waited.total_seconds() * 1000 - float(first["duration_ms"])

    async def _timed(self, kind: str, method: str, path: str, **options: Any) -> Json:
        began = time.perf_counter()
        answer = await self._request(method, path, **options)
        self.took.setdefault(kind, []).append((time.perf_counter() - began) * 1000)
        return answer

    async def _request(self, method: str, path: str, **options: Any) -> Json:
        async with self._session.request(method, path, **options) as response:
            body: Json = await response.json()
            if response.status >= 300:
                raise RuntimeError(f"{method} {path}: {response.status} {body}")
            return body


async def in_parallel(concurrency: int, work: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Do all of it, so many at a time, and return the results in order."""
    gate = asyncio.Semaphore(concurrency)

    async def one(job: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await job()

    return await asyncio.gather(*(one(job) for job in work))
