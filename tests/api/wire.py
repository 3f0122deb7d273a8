"""HTTP as bytes, for what no client library would send."""

import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from app.devstack.stack import Api

HOST = b"Host: api.test\r\n"
CLOSE = b"Connection: close\r\n"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def problem(self) -> str:
        """The last part of its type."""
        document: dict[str, Any] = json.loads(self.body)
        assert document["status"] == self.status
        assert ("content-type", "application/problem+json") in self.headers
        assert ("x-request-id", document["request_id"]) in self.headers
        return str(document["type"]).rpartition(":")[2]


def connect(api: Api, *, seconds: float = 10) -> socket.socket:
    return socket.create_connection(("127.0.0.1", api.port), timeout=seconds)


def exchange(api: Api, sent: bytes, *, seconds: float = 10) -> list[Answer]:
    """Everything that is answered until the API closes the connection. Fails where it does not."""
    with connect(api, seconds=seconds) as connection:
        with suppress(OSError):  # it has heard enough; what it said can still be read
            connection.sendall(sent)
        return answers(read_all(connection))


def read_all(connection: socket.socket) -> bytes:
    parts: list[bytes] = []
    with suppress(ConnectionResetError):
        while part := connection.recv(262_144):
            parts.append(part)
    return b"".join(parts)


def answers(received: bytes) -> list[Answer]:
    """What came, taken apart by the lengths that it declares."""
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        length = int(dict(headers).get("content-length", 0))
        found.append(Answer(int(first.split()[1]), headers, received[:length]))
        received = received[length:]
    return found
