"""A connection through the proxy: what passes, when, and what gets lost."""

import asyncio
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from app.devstack.ports import LOOPBACK
from tests.faults.wire import Wire

_CLOSE_WITH_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 s: closing sends an RST, and drops what was not delivered."""


class Swallowed:
    """The reply that is to get lost."""

    def __init__(
        self, request: bytes, replies: Callable[[bytes], bool], withdraw: "Callable[[Swallowed], None]"
    ) -> None:
        self.request = request
        self.replies = replies
        self.happened = threading.Event()
        self._withdraw = withdraw

    def wait(self, seconds: float = 10) -> None:
        """Until the server has executed the request and the client's connection is reset."""
        assert self.happened.wait(seconds), f"no reply to {self.request!r} was swallowed within {seconds:g} s"

    def cancel(self) -> None:
        """Let the reply pass, if it has not got lost yet."""
        self._withdraw(self)


@dataclass
class Faults:
    """What is in force."""

    delay: float = 0.0
    is_silent: bool = False
    swallows: list[Swallowed] = field(default_factory=list)

    def want(self, request: bytes) -> bool:
        """May the reply to this be one to swallow?"""
        return any(swallow.request in request for swallow in self.swallows)

    def take(self, request: bytes, reply: bytes) -> Swallowed | None:
        """The one that this reply is swallowed for; it is done with that."""
        for swallow in self.swallows:
            if swallow.request in request and swallow.replies(reply):
                self.swallows.remove(swallow)
                return swallow
        return None


class Link:
    """A client's connection, and ours to the server in its stead."""

    def __init__(
        self,
        client: socket.socket,
        *,
        loop: asyncio.AbstractEventLoop,
        faults: Faults,
        wire: Wire,
        chunk_bytes: int,
        forget: "Callable[[Link], None]",
    ) -> None:
        self.loop = loop
        self.faults = faults
        self.chunk_bytes = chunk_bytes
        self._wire = wire
        self._forget = forget
        self._client = client
        self._server = socket.socket()
        self._flows = (_Flow(self, client, self._server, self._ask), _Flow(self, self._server, client, self._answer))
        self._held = b""
        self._has_begun = False
        """The client has the beginning of a reply."""
        for side in (self._client, self._server):
            side.setblocking(False)
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def open(self, target_port: int) -> None:
        self._server.connect_ex((LOOPBACK, target_port))  # what comes of it is seen when reading and writing
        for flow in self._flows:
            flow.start()

    def freeze(self) -> None:
        for flow in self._flows:
            flow.stop()

    def close(self) -> None:
        self.freeze()
        self._client.close()
        self._server.close()
        self._forget(self)

    def reset(self) -> None:
        for side in (self._client, self._server):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_WITH_RESET)
        self.close()

    def _ask(self, chunk: bytes) -> bytes:
        self._wire.asked(chunk)
        return chunk

    def _answer(self, chunk: bytes) -> bytes:
        """What of it the client gets now. Where a reply may be one to swallow, that waits for its end."""
        passed = b""
        for part in self._wire.answered(chunk):
            self._held += part.data
            if not self._has_begun and self.faults.want(part.request):
                if not part.is_end:
                    continue
                if swallowed := self.faults.take(part.request, self._held):
                    self.reset()
                    swallowed.happened.set()
                    return b""
            passed += self._held
            self._held = b""
            self._has_begun = not part.is_end
        return passed


class _Flow:
    """One direction of a link. `look`: what of a chunk is passed on."""

    def __init__(self, link: Link, source: socket.socket, sink: socket.socket, look: Callable[[bytes], bytes]) -> None:
        self._link = link
        self._source = source
        self._sink = sink
        self._look = look
        self._chunks: deque[tuple[float, bytes]] = deque()
        """When each is due (time of the loop); an empty one is the end. As long as there are any, a timer runs or the
        sink is waited for."""
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._link.loop.add_reader(self._source, self._read)

    def stop(self) -> None:
        self._link.loop.remove_reader(self._source)
        self._link.loop.remove_writer(self._sink)
        if self._timer is not None:
            self._timer.cancel()

    def _read(self) -> None:
        try:
            chunk = self._source.recv(self._link.chunk_bytes)
        except BlockingIOError:
            return
        except OSError:
            self._link.reset()
            return
        if not chunk:
            self._link.loop.remove_reader(self._source)
            self._pass_on(chunk)
        elif passed := self._look(chunk):
            self._pass_on(passed)

    def _pass_on(self, chunk: bytes) -> None:
        self._chunks.append((self._link.loop.time() + self._link.faults.delay, chunk))
        if len(self._chunks) == 1:
            self._send()

    def _send(self) -> None:
        loop = self._link.loop
        while self._chunks:
            due, chunk = self._chunks[0]
            if due > loop.time():
                self._timer = loop.call_at(due, self._send)
                return
            if not chunk:
                self._link.close()
                return
            try:
                sent = self._sink.send(chunk)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._link.reset()
                return
            if sent < len(chunk):
                self._chunks[0] = (due, chunk[sent:])
                loop.remove_reader(self._source)  # which keeps its chunks until these have gone
                loop.add_writer(self._sink, self._send_the_rest)
                return
            self._chunks.popleft()

    def _send_the_rest(self) -> None:
        self.stop()
        self.start()
        self._send()
