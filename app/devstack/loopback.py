"""HTTP for the stand-in model server: plain ASGI under uvicorn, with the power to break a connection."""

import asyncio
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = "127.0.0.1"
JSON = b"application/json"
EVENT_STREAM = b"text/event-stream"
_HANG_UP = "agent_service.hang_up"
"""ASGI extension of our protocol class: close the connection, whatever has been sent on it."""


class ClientLeft(Exception):
    """The connection is closed; there is nobody left to answer."""


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._scope = scope
        self._receive = receive
        self._send = send

    async def body(self) -> bytes:
        """Raises `ClientLeft`."""
        chunks = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunks.append(message["body"])
            if not message["more_body"]:
                return b"".join(chunks)

    async def answer(self, status: int, body: bytes, *, retry_after: str | None = None) -> None:
        await self.start(status, JSON, length=len(body), retry_after=retry_after)
        await self.end(body)

    async def stream(self, events: Iterable[bytes]) -> None:
        await self.start(200, EVENT_STREAM)
        for event in events:
            await self.write(event)
        await self.end()

    async def start(
        self, status: int, content_type: bytes, *, length: int | None = None, retry_after: str | None = None
    ) -> None:
        headers = [(b"content-type", content_type)]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        if retry_after is not None:
            headers.append((b"retry-after", retry_after.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, piece: bytes) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self, piece: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": piece})

    async def pause(self, seconds: float | None) -> None:
        """Wait; without a number for as long as the client does.

        Raises `ClientLeft`.
        """
        try:
            async with asyncio.timeout(seconds):
                while (await self._receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            return
        raise ClientLeft

    async def hang_up(self) -> None:
        """Close the connection, whatever has been sent on it.

        Raises `ClientLeft`.
        """
        self._scope["extensions"][_HANG_UP]()
        await self.pause(None)


class _Protocol(HttpToolsProtocol):
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_HANG_UP: self.transport.close}  # type: ignore[dict-item]


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Nobody needs the answers that are still under way; a stalled one would hold up the end.
        for connection in list(self.server_state.connections):
            connection.transport.close()
        await super().shutdown(sockets)


def serve(application: Application, port: int, *, ready: Callable[[str], None], host: str = LOOPBACK) -> None:
    """Serve until SIGTERM or SIGINT, then exit with 0. `ready` gets the address; port 0 takes a free one.

    Raises `OSError` where the port is taken.
    """
    listener = socket.create_server((host, port))
    address = f"http://{host}:{listener.getsockname()[1]}"
    config = uvicorn.Config(
        application,
        http=_Protocol,
        interface="asgi3",
        lifespan="off",
        ws="none",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=75,  # longer than clients keep theirs, so that none is closed under a request
    )
    # uvicorn raises the signal again when it is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    _Server(config, ready=lambda: ready(address)).run([listener])
