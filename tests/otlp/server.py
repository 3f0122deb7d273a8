"""The HTTP of a stand-in for a tracing back end, and how it may misbehave."""

import json
import socket
import struct
from collections.abc import Mapping
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from app.devstack.ports import LOOPBACK
from tests.otlp.spans import Request

if TYPE_CHECKING:
    from tests.otlp.back_end import BackEnd

SLOW_SECONDS = 0.7
RETRY_AFTER_SECONDS = 1
TRICKLE_SECONDS = 0.2


class Mode(StrEnum):
    """How a receiver does from now on; what it is in the middle of stays as it is."""

    OK = "ok"
    SLOW = "slow"
    """The answer comes after `SLOW_SECONDS`."""
    HANG = "hang"
    """It takes connections and requests, and never answers."""
    TRICKLE = "trickle"
    """Its answer never ends: a byte every `TRICKLE_SECONDS`."""
    PARTIAL = "partial"
    """It takes the request, and one item of it not."""
    REFUSE = "refuse"
    """401."""
    BUSY = "busy"
    """429, come back in `RETRY_AFTER_SECONDS`."""
    BROKEN = "broken"
    """503."""
    REDIRECT = "redirect"
    """307 to somewhere else, where nobody may follow."""
    RESET = "reset"
    """The connection is reset in the middle of the request."""
    GARBAGE = "garbage"
    """The answer is no HTTP."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, back_end: "BackEnd", port: int) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.back_end = back_end
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # it is closed already
                continue

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        back_end = self.server.back_end
        mode = back_end.mode
        headers = {name.lower(): value for name, value in self.headers.items()}
        if mode is Mode.RESET:
            back_end.requests.append(Request(self.command, self.path, headers, b""))
            self._reset()
            return
        request = Request(self.command, self.path, headers, self.rfile.read(int(headers.get("content-length", 0))))
        back_end.requests.append(request)
        if complaint := back_end.complaint(request):
            back_end.complaints.append(complaint)
            self._answer(400)
            return
        self._answer_as(mode, request)

    do_GET = do_POST
    do_PUT = do_POST

    def _answer_as(self, mode: Mode, request: Request) -> None:
        back_end = self.server.back_end
        match mode:
            case Mode.OK | Mode.SLOW:
                if mode is Mode.SLOW:
                    back_end.closed.wait(SLOW_SECONDS)
                back_end.taken.append(request)
                self._take(request)
            case Mode.PARTIAL:
                self._take_all_but_one(request)
            case Mode.HANG:
                while back_end.mode is Mode.HANG and not back_end.closed.wait(0.05):
                    pass
                self.close_connection = True
            case Mode.TRICKLE:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Endless: ")
                while not back_end.closed.wait(TRICKLE_SECONDS):
                    self.wfile.write(b"x")
            case Mode.REFUSE:
                self._answer(401, body=b'{"message": "Invalid credentials"}')
            case Mode.BUSY:
                self._answer(429, {"Retry-After": str(RETRY_AFTER_SECONDS)})
            case Mode.BROKEN:
                self._answer(503)
            case Mode.REDIRECT:
                self._answer(307, {"Location": f"{back_end.address}/elsewhere"})
            case Mode.GARBAGE:
                self.wfile.write(b"\x00\xffthis is no HTTP\r\n\r\n" * 20)
                self.close_connection = True

    def _take(self, request: Request) -> None:
        if request.path == self.server.back_end.front.scores_path:
            self._answer(202, {"Content-Type": "application/json"}, b'{"message": "Accepted"}')
        else:
            self._answer(200, {"Content-Type": "application/x-protobuf"})

    def _take_all_but_one(self, request: Request) -> None:
        if request.path == self.server.back_end.front.scores_path:
            body = {"accepted": len(json.loads(request.plain)) - 1, "rejected": 1, "errors": []}
            self._answer(207, {"Content-Type": "application/json"}, json.dumps(body).encode())
        else:
            answer = ExportTraceServiceResponse(partial_success=ExportTracePartialSuccess(rejected_spans=1))
            self._answer(200, {"Content-Type": "application/x-protobuf"}, answer.SerializeToString())

    def _answer(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the library
        """Nothing: what matters is in the requests."""
