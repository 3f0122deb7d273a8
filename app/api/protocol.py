"""HTTP/1.1 by httptools, for clients that are not to be trusted with our time and memory.

A connection is bounded in what it may send and how long it may take, whoever it is. What cannot become a request is
answered with a problem, too. Once there are as many connections as there may be, a new one takes the place of the
one that has been without a request for longest; where every one has a request, the new one is told 503.
"""

import logging
import resource
import secrets
from asyncio import TimerHandle, Transport
from enum import Enum, auto
from typing import Any, ClassVar

import httptools
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from app.api.errors import PROBLEM_JSON, RETRY_AFTER_SECONDS, HeadTooLarge, NotHttp, RequestTimeout, problem_body
from app.api.middleware import RequestContext
from app.domain.errors import RequestError, Unavailable
from app.logging import bound_fields

MAX_HEAD_BYTES = 65_536
"""Request line and header fields."""
MAX_FIELDS = 128
MAX_PARAMETERS = 128
"""In the query. The framework compares each of those it does not know with all the others."""
MAX_OVERHEAD_BYTES = 8 * 1_048_576
"""What a body may have around it on the wire: sizes of chunks, their extensions, trailers."""
HEAD_SECONDS = 10.0
"""From its first byte to its end."""
LINGER_SECONDS = 5.0
"""After an answer that ends the connection, or came before the body's end: for the client to finish, and to read it."""
READ_SECONDS = 30.0
READ_BYTES_PER_SECOND = 32_768
"""A client that takes its answer slower than this, after the first half minute, is given up."""
MAX_CONNECTIONS = 5_000
_OTHER_FILES = 64
"""Open beside the connections: those to Postgres and Redis, libraries, the log."""

_ONLY_ONCE = frozenset(
    {b"authorization", b"host", b"content-length", b"transfer-encoding", b"content-type", b"content-encoding"}
    | {b"idempotency-key", b"x-request-id"}
)
"""Header fields of which two readers might take two different ones."""
_VERSIONS = ("1.0", "1.1")

logger = logging.getLogger("app.api")


def most_connections() -> int:
    """`MAX_CONNECTIONS`, or as many as this process may have files open, which it asks to be as many as it can get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _OTHER_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MAX_CONNECTIONS, soft - _OTHER_FILES)


class _Expects(Enum):
    """What comes next from the client."""

    HEAD = auto()
    """A request, or the end of the connection."""
    REST_OF_HEAD = auto()
    REST_OF_BODY = auto()
    NOTHING = auto()
    """It was refused: whatever it still sends is not looked at."""


class ProblemProtocol(HttpToolsProtocol):
    """One connection."""

    head_seconds: ClassVar[float] = HEAD_SECONDS
    linger_seconds: ClassVar[float] = LINGER_SECONDS
    read_seconds: ClassVar[float] = READ_SECONDS
    read_bytes_per_second: ClassVar[float] = READ_BYTES_PER_SECOND

    _without_request: ClassVar[dict["ProblemProtocol", None]] = {}
    """All of this process that could be closed and nobody's work would be lost; the longest so first."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any | None = None
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._most, self.limit_concurrency = self.limit_concurrency, None  # the framework would answer with plain text
        self._expects = _Expects.HEAD
        self._received = self._body_bytes = 0
        self._refusal: RequestError | None = None
        self._timer: TimerHandle | None = None
        self._reading_timer: TimerHandle | None = None

    # -- the connection

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._without_request[self] = None
        self._in(self.timeout_keep_alive)
        if self._is_crowded:
            oldest = next(iter(self._without_request))
            if oldest is not self:
                oldest.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._without_request.pop(self, None)
        self._in(None)
        self.resume_writing()

    @property
    def _is_crowded(self) -> bool:
        return self._most is not None and len(self.connections) > self._most

    def drop(self) -> None:
        """End the connection, and do not wait until the client has taken what was sent to it."""
        self._without_request.pop(self, None)
        self.connections.discard(self)
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        seconds = self.read_seconds + self.transport.get_write_buffer_size() / self.read_bytes_per_second
        self._reading_timer = self.loop.call_later(seconds, self.drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_timer:
            self._reading_timer.cancel()
            self._reading_timer = None

    # -- what the client sends

    def data_received(self, data: bytes) -> None:
        if self._expects is _Expects.NOTHING:
            return
        self._received += len(data)
        self._refusal = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(self._refusal or NotHttp("this is not HTTP that can be read"))
        except httptools.HttpParserUpgrade:
            self._expects = _Expects.NOTHING  # what follows is another protocol's
            self.cycle.keep_alive = False
        else:
            if self._expects is _Expects.REST_OF_HEAD and self._received > MAX_HEAD_BYTES:
                self._refuse(_head_too_large())
            elif self._expects is _Expects.REST_OF_BODY and self._received - self._body_bytes > MAX_OVERHEAD_BYTES:
                self._refuse(NotHttp("there is too much around the body"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expects = _Expects.REST_OF_HEAD
        self._received = self._body_bytes = 0
        self._in(self.head_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._expects is _Expects.REST_OF_HEAD:  # else it is a trailer: the request has begun without it
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._refusal = self._fault_in_head()
        if self._refusal:
            raise self._refusal
        is_probe = self.url.startswith(b"/health")
        self.app = _no_room if self._is_crowded and not is_probe else self.config.loaded_app
        super().on_headers_complete()
        self._expects = _Expects.REST_OF_BODY
        self._in(None)
        self._without_request.pop(self, None)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._expects = _Expects.HEAD
        if self.cycle.response_complete:
            self._rest(self.timeout_keep_alive)

    def _fault_in_head(self) -> RequestError | None:
        is_long = len(self.url) + sum(map(_size, self.headers)) > MAX_HEAD_BYTES
        if is_long or len(self.headers) > MAX_FIELDS or self.url.count(b"&") >= MAX_PARAMETERS:
            return _head_too_large()
        version = self.parser.get_http_version()
        names = [name for name, _ in self.headers]
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if version not in _VERSIONS:
            return NotHttp("send HTTP/1.1")
        if version == "1.1" and b"host" not in names:
            return NotHttp("the header field Host is missing")
        if codings and (codings != [b"chunked"] or version == "1.0"):
            return NotHttp("no other transfer coding than chunked is known here")
        if twice := sorted({name.decode() for name in names if name in _ONLY_ONCE and names.count(name) > 1}):
            return NotHttp(f"may be there only once: {', '.join(twice)}")
        return None

    # -- what it is answered

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # any byte would reset that timer
        if not self.cycle.response_complete or self._expects is _Expects.REST_OF_HEAD:
            return  # the next request is there already, or on its way
        is_last = self.transport.is_closing() or self._expects is not _Expects.HEAD
        self._rest(self.linger_seconds if is_last else self.timeout_keep_alive)

    def _rest(self, seconds: float) -> None:
        """There is no request for now."""
        self._without_request[self] = None
        self._in(seconds)

    def _in(self, seconds: float | None) -> None:
        """When it will have taken too long; None: not as far as this connection can tell."""
        if self._timer:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._take_no_longer)

    def _take_no_longer(self) -> None:
        if self._expects is _Expects.REST_OF_HEAD:
            self._refuse(RequestTimeout(f"the head did not come within {self.head_seconds:g} seconds"))
        elif self._reading_timer:
            self._in(self.linger_seconds)  # it still takes its answer, and that has a time of its own
        else:
            self.drop()

    def _refuse(self, error: RequestError) -> None:
        """Look at nothing more of what comes, and say why, unless that could be taken for another request's answer."""
        is_in_body = self._expects is _Expects.REST_OF_BODY
        self._expects = _Expects.NOTHING
        if self.cycle is None or self.cycle.response_complete:
            self._answer(error)
        elif not is_in_body:
            self.cycle.keep_alive = False  # what was asked before is answered, and then it is over
            self._in(None)
        elif self.cycle.response_started or self.pipeline:
            self.drop()
        else:
            self._answer(error)
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _answer(self, error: RequestError) -> None:
        request_id = secrets.token_hex(16)
        body = problem_body(error, path="", request_id=request_id)
        head = (
            f"content-type: {PROBLEM_JSON}\r\nx-request-id: {request_id}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
        self.transport.write_eof()  # closed at once, the answer could be lost with what the client still sends
        self._rest(self.linger_seconds)
        fields = {"status": error.status, "request_id": request_id, "why": error.detail}
        logger.info("not a request", extra={"fields": fields})


def _size(field: tuple[bytes, bytes]) -> int:
    return len(field[0]) + len(field[1]) + 4


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(
        f"it may have {MAX_HEAD_BYTES} bytes, {MAX_FIELDS} header fields and {MAX_PARAMETERS} parameters"
    )


async def _tell_no_room(scope: Scope, receive: Receive, send: Send) -> None:
    error = Unavailable("there are too many requests at once; try again")
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS), "Connection": "close"}
    run_id = bound_fields().get("run_id")
    body = problem_body(error, path=scope["path"], request_id=scope["state"]["request_id"], run_id=run_id)
    await Response(body, error.status, headers, PROBLEM_JSON)(scope, receive, send)


_no_room = RequestContext(_tell_no_room)
