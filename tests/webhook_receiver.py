"""An endpoint of somebody's over loopback HTTP: keeps what it was sent, answers as it is told, verifies signatures.

The verification is written after the specification of Standard Webhooks, and shares no code with the service.
"""

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from app.devstack.ports import LOOPBACK

TOLERANCE_SECONDS = 300


@dataclass(frozen=True)
class Message:
    """What arrived: header names in lower case. `at`: by this machine's clock."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.body)
        return content

    @property
    def run_id(self) -> str:
        return str(self.content["data"]["run_id"])


@dataclass(frozen=True)
class Answer:
    """`after`: seconds before the first byte of it."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    after: float = 0.0


class Receiver(ThreadingHTTPServer):
    """`messages`: all that arrived, oldest first. `answers`: chooses the answer to each; 200 by default."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.messages: list[Message] = []
        self.answers: Callable[[Message], Answer] = lambda message: Answer()
        self.most_at_once: dict[str, int] = {}
        """How many requests there were at a time, at most: by path."""
        self.lock = threading.Lock()
        self._open: dict[str, int] = {}

    @property
    def origin(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}"

    def url(self, path: str = "/hook") -> str:
        return f"{self.origin}{path}"

    def answer_in_turn(self, *answers: Answer) -> None:
        """These, one after the other; the last one for all that follow."""
        left = list(answers)

        def next_one(message: Message) -> Answer:
            return left.pop(0) if len(left) > 1 else left[0]

        self.answers = next_one

    def until(self, count: int, *, seconds: float = 10) -> list[Message]:
        """What has arrived, as soon as it is so many."""
        until = time.monotonic() + seconds
        while len(self.messages) < count:
            assert time.monotonic() < until, f"{len(self.messages)} messages and not {count} within {seconds:g} s"
            time.sleep(0.01)
        return list(self.messages)

    def entered(self, path: str) -> None:
        with self.lock:
            self._open[path] = self._open.get(path, 0) + 1
            self.most_at_once[path] = max(self.most_at_once.get(path, 0), self._open[path])

    def left(self, path: str) -> None:
        with self.lock:
            self._open[path] -= 1

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers["content-length"]))
        message = Message(self.path, headers, body, time.time())
        self.server.entered(self.path)
        try:
            with self.server.lock:
                self.server.messages.append(message)
                answer = self.server.answers(message)
            time.sleep(answer.after)
            self.send_response(answer.status)
            for name, value in {"Content-Length": "0", **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
        finally:
            self.server.left(self.path)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the library
        """Nothing: what matters is in the messages."""


@contextmanager
def a_receiver(port: int = 0) -> Iterator[Receiver]:
    with Receiver(port) as receiver:
        threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield receiver
        finally:
            receiver.shutdown()


class NotGenuine(Exception):
    """The message is not from who has the secret, or too old."""


def verify(secret: str, headers: Mapping[str, str], body: bytes, *, now: float | None = None) -> None:
    """Raises `NotGenuine`."""
    key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    sent_at = int(headers["webhook-timestamp"])
    if abs((time.time() if now is None else now) - sent_at) > TOLERANCE_SECONDS:
        raise NotGenuine("its timestamp is not of now")
    signed = f"{headers['webhook-id']}.{sent_at}.".encode() + body
    expected = hmac.new(key, signed, hashlib.sha256).digest()
    for signature in headers["webhook-signature"].split(" "):
        version, _, value = signature.partition(",")
        if version == "v1" and hmac.compare_digest(base64.b64decode(value), expected):
            return
    raise NotGenuine("no signature fits")
