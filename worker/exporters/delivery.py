"""Brings parcels to one back end: a bounded queue, and a thread that posts them one after the other."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from app.back_ends import BackEnd
from worker.exporters.room import Room
from worker.metrics import Drop, WorkerMetrics

logger = logging.getLogger(__name__)

MOST_ITEMS = 4_096
MOST_BYTES = 16 * 1024 * 1024
"""What may wait for one back end."""
LITTLE = 32
"""What may wait for a back end that has not taken what it was sent last: enough to find out that it is back."""
ATTEMPT_SECONDS = 10.0
"""How long one attempt may take, from the connection to the end of the answer."""
PAUSES = (1.0, 4.0)
"""Seconds, where the back end does not say how long."""
LONGEST_PAUSE = 30.0
LOG_SECONDS = 60.0
"""How often it is logged at most that a back end does not take what it is sent."""
_WORTH_RETRYING = frozenset({429, 502, 503, 504})
_ANSWER_BYTES = 65_536
_SPANS = {"content-type": "application/x-protobuf", "content-encoding": "gzip"}


class Load(Protocol):
    """Spans or scores for one request: how many `items`, and about how many bytes they take while they wait."""

    items: int
    size: int

    def pack(self) -> tuple[bytes, int]:
        """The body of the request, and how many items are in it."""
        ...


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is to be sent, and where."""

    url: str
    headers: Mapping[str, str]
    load: Load


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an attempt. `error`: why nothing was taken; `rejected`: how many items were not, all the same."""

    error: str | None = None
    is_worth_retrying: bool = False
    retry_after: float | None = None
    rejected: int = 0


class Delivery:
    """To one back end. `pauses`: before the second attempt and those that follow, in seconds."""

    def __init__(
        self,
        back_end: BackEnd,
        metrics: WorkerMetrics,
        *,
        attempt_seconds: float = ATTEMPT_SECONDS,
        pauses: Sequence[float] = PAUSES,
    ) -> None:
        self.name = back_end.name
        self._url = back_end.traces_url
        self._headers = {**back_end.headers, **_SPANS}
        self._metrics = metrics
        self._attempt_seconds = attempt_seconds
        self._pauses = pauses
        self._room = Room(MOST_ITEMS, MOST_BYTES)
        self._queue: SimpleQueue[Parcel | None] = SimpleQueue()
        self._closing = threading.Event()
        self._is_struggling = False
        self._lost_unlogged = 0
        self._logged_at = -LOG_SECONDS
        self._thread = threading.Thread(target=self._work, name=f"telemetry {self.name}", daemon=True)
        self._thread.start()

    def is_taking(self, ahead: int = 0) -> bool:
        """False: what is offered after `ahead` more items is dropped."""
        return not self._room.is_full and not (self._is_struggling and self._room.items + ahead >= LITTLE)

    def offer_spans(self, spans: Load) -> None:
        """For as soon as what came before is through. From any thread; never waits."""
        self.offer(Parcel(self._url, self._headers, spans))

    def offer(self, parcel: Parcel) -> None:
        """The same for any request."""
        if self.is_taking() and self._room.take(parcel.load.items, parcel.load.size):
            self._queue.put(parcel)
        else:
            self.refuse(parcel.load.items)

    def refuse(self, items: int) -> None:
        """Count what was not even offered, because it would not have been taken."""
        self.lose(items, self._room.refusal)

    def lose(self, items: int, reason: Drop, error: str = "") -> None:
        """Count what does not arrive, and say so once in a while."""
        if not items:
            return
        self._metrics.spans_dropped(self.name, reason, items)
        self._lost_unlogged += items
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            fields = {"back_end": self.name, "reason": str(reason), "error": error, "lost": self._lost_unlogged}
            logger.warning("traces are lost", extra={"fields": fields})
            self._logged_at = time.monotonic()
            self._lost_unlogged = 0

    def close(self) -> threading.Thread:
        """Bring what waits without a pause, and end. The thread ends when that is done."""
        self._closing.set()
        self._queue.put(None)
        return self._thread

    def give_up(self) -> None:
        """Count what still waits, or is on its way, as lost."""
        self._logged_at = -LOG_SECONDS
        self.lose(self._room.close(), Drop.ENDED)

    def _work(self) -> None:
        with asyncio.Runner() as runner:
            session = runner.run(_open_session(self._url, self._attempt_seconds))
            try:
                while not self._room.is_closed and (parcel := self._queue.get()) is not None:
                    self._bring(runner, session, parcel)
            finally:
                runner.run(session.close())

    def _bring(self, runner: asyncio.Runner, session: ClientSession, parcel: Parcel) -> None:
        sent = 0
        try:
            body, packed = parcel.load.pack()
            answer = self._send(runner, session, parcel, body) if packed else Answer(error="cannot be encoded")
            if answer.error is None:
                sent = packed - min(max(0, answer.rejected), packed)
        except Exception as error:  # whatever a back end answers: without this thread it gets nothing any more
            logger.exception("sending traces failed", extra={"fields": {"back_end": self.name}})
            answer = Answer(error=type(error).__name__)
        self._is_struggling = answer.error is not None
        if self._room.leave(parcel.load.items, parcel.load.size):
            if sent:
                self._metrics.spans_sent(self.name, sent)
            self.lose(parcel.load.items - sent, Drop.FAILED, answer.error or "rejected")

    def _send(self, runner: asyncio.Runner, session: ClientSession, parcel: Parcel, body: bytes) -> Answer:
        answer = runner.run(_post(session, parcel, body))
        for pause in self._pauses:
            if not answer.is_worth_retrying:
                break
            self._closing.wait(pause if answer.retry_after is None else answer.retry_after)
            answer = runner.run(_post(session, parcel, body))
        return answer


async def _open_session(url: str, attempt_seconds: float) -> ClientSession:
    """Through the environment's proxy, where it has one for this address; without its `.netrc`, and without cookies."""
    address = urlsplit(url)
    proxy = getproxies_environment().get(address.scheme)
    if proxy_bypass(address.hostname or ""):
        proxy = None
    return ClientSession(
        cookie_jar=DummyCookieJar(),
        headers={"user-agent": "agent-service", "accept-encoding": "identity"},
        timeout=ClientTimeout(total=attempt_seconds),
        proxy=proxy,
        trust_env=False,
    )


async def _post(session: ClientSession, parcel: Parcel, body: bytes) -> Answer:
    try:
        async with session.post(parcel.url, data=body, headers=parcel.headers, allow_redirects=False) as response:
            return await _answer(response)
    except TimeoutError as error:
        return Answer(error=type(error).__name__)
    except (ClientError, OSError) as error:
        # For one, an idle connection that the back end has closed is found out only now. What arrives twice counts
        # once: a span has an id, and so has a score.
        return Answer(error=type(error).__name__, is_worth_retrying=True)


async def _answer(response: ClientResponse) -> Answer:
    if 200 <= response.status < 300:
        return Answer(rejected=_rejected(response, await response.content.read(_ANSWER_BYTES)))
    return Answer(
        error=f"HTTP {response.status}",
        is_worth_retrying=response.status in _WORTH_RETRYING,
        retry_after=_seconds(response.headers.get("retry-after")),
    )


def _rejected(response: ClientResponse, body: bytes) -> int:
    """How many items it did not take of a request that it took: OTLP's partial success, and Langfuse's 207."""
    try:
        if response.content_type == "application/x-protobuf":
            return int(ExportTraceServiceResponse.FromString(body).partial_success.rejected_spans)
        if response.status == 207:
            return int(json.loads(body)["rejected"])
    except (DecodeError, ValueError, KeyError, TypeError):
        pass  # it took the request, and says so in a way that is not understood
    return 0


def _seconds(retry_after: str | None) -> float | None:
    """Of `Retry-After` in its numeric form."""
    if retry_after is None or not retry_after.isascii() or not retry_after.isdigit():
        return None
    return min(float(retry_after), LONGEST_PAUSE)
