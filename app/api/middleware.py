"""Around every request: its id, its log line, the limits of its body, and the answer to a bug. Plain ASGI."""

import asyncio
import logging
import re
import secrets
import time
from uuid import UUID

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import BodyTooLarge, InternalError, RequestTimeout, problem_response
from app.api.metrics import UNKNOWN_ROUTE, Metrics
from app.domain.trace_context import TraceContext
from app.logging import about_run, add, bind
from app.redaction import without_personal

MAX_BODY_BYTES = 1_048_576
BODY_SECONDS = 30.0
"""For the whole of it, from the end of the head: 280 kbit/s for the largest."""
REQUEST_ID = "X-Request-Id"
REQUEST_ID_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
_RUN_IN_PATH = re.compile(r"/v1/runs/([0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}|[0-9A-Fa-f]{32})(?:/|\Z)")
_CLIENT_GONE = 499
"""What the log says where nobody is left to answer."""

logger = logging.getLogger("app.api")


class RequestContext:
    """Gives every request an id, logs it, and answers what nobody expected with a problem that tells nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request = Request(scope)
        request_id = request.state.request_id = _request_id(request.headers)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with bind(request_id=request_id):
            _note_subject(request)
            try:
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                status = _CLIENT_GONE
            except Exception:
                logger.exception("unexpected error")
                if status:
                    raise  # too late for another answer: the server cuts the connection
                error = InternalError("this was not your fault; the log has it under request_id")
                await problem_response(request, error)(scope, receive, send_with_id)
            finally:
                seconds = time.perf_counter() - started
                _log(request, status, seconds)
                _count(request, status, seconds)


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID, "")
    is_harmless = re.fullmatch(REQUEST_ID_PATTERN, given) and without_personal(given) == given
    return given if is_harmless else secrets.token_hex(16)


def _note_subject(request: Request) -> None:
    """Which run is this about, and which trace of the caller's is it a part of?"""
    if found := _RUN_IN_PATH.match(request.scope["path"]):
        about_run(UUID(found[1]))
    if caller := TraceContext.sent(request.headers.getlist("traceparent")):
        add(caller_trace_id=caller.trace_id)


def _route(request: Request) -> str:
    """The template, which no caller can make up."""
    return getattr(request.scope.get("route"), "path", UNKNOWN_ROUTE)


def _count(request: Request, status: int, seconds: float) -> None:
    state = request.scope["state"]
    metrics: Metrics = state["metrics"]
    metrics.observe_request(request.method, _route(request), status or _CLIENT_GONE, seconds - state.get("held_s", 0.0))


def _log(request: Request, status: int, seconds: float) -> None:
    path = _route(request)
    if path.startswith("/health"):
        return
    fields = {
        "method": request.method,
        "path": path,
        "status": status,
        "duration_ms": round(seconds * 1000, 1),
    }
    logger.info("request", extra={"fields": fields})


class BodyLimit:
    """Lets nobody read more than `MAX_BODY_BYTES` of a body, or wait longer for it than `BODY_SECONDS`.

    Starlette has a limit of bytes too, but answers a declared length with plain text, past our handlers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        until = asyncio.get_running_loop().time() + BODY_SECONDS
        received = 0
        is_complete = False

        async def receive_within_limits() -> Message:
            nonlocal received, is_complete
            if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
                raise _too_large()
            try:
                async with asyncio.timeout_at(None if is_complete else until):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeout(f"the body did not come within {BODY_SECONDS:g} seconds") from None
            received += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received > MAX_BODY_BYTES:
                raise _too_large()
            return message

        await self._app(scope, receive_within_limits, send)


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"a body may have {MAX_BODY_BYTES} bytes")
