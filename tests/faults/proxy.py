"""A TCP proxy between the service and one of its servers, with the faults of a network at a test's command.

It runs on an event loop in a thread of the test's process. What is asked of it from the test's thread is in force when
the call returns.
"""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from app.devstack.ports import LOOPBACK, free_port
from tests.faults.link import Faults, Link, Swallowed
from tests.faults.wire import Wire, anything

_CHUNK_BYTES = 65536

T = TypeVar("T")


class Proxy:
    """Passes on what clients of `port` and the server say to each other. Raises at its end what went wrong in itself.

    `wire`: makes what follows one connection's protocol. `chunk_bytes`: the most that is passed on at a time.
    """

    def __init__(self, target_port: int, *, wire: Callable[[], Wire], chunk_bytes: int = _CHUNK_BYTES) -> None:
        self.port = free_port()
        self._target_port = target_port
        self._wire = wire
        self._chunk_bytes = chunk_bytes
        self._faults = Faults()
        self._links: set[Link] = set()
        self._problem: Exception | None = None

    def cut(self) -> None:
        """Reset every open connection. New ones are served."""
        self._on_loop(self._reset_all)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Connections are reset, new ones refused."""
        self._on_loop(self._stop_listening)
        try:
            yield
        finally:
            self._on_loop(self._listen)

    @contextmanager
    def delaying(self, seconds: float) -> Iterator[None]:
        """Every chunk is held for so long, in both directions. Those still held at the end keep their time."""
        before = self._faults.delay
        self._on_loop(lambda: self._delay(seconds))
        try:
            yield
        finally:
            self._on_loop(lambda: self._delay(before))

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing passes and nothing is closed, whatever either side does. New connections are accepted and as mute.

        At the end all of them are reset.
        """
        self._on_loop(self._fall_silent)
        try:
            yield
        finally:
            self._on_loop(self._speak_again)

    def swallow(self, request: str | bytes, *, replies: Callable[[bytes], bool] = anything) -> Swallowed:
        """Once, the server executes a request with this in its text, and instead of the reply the client gets a reset.

        It is the first such request whose reply has not begun to arrive, so also one that is under way already. A reply
        that does not count according to `replies` passes, and the next one is looked at. Whatever else is under way on
        the connection is lost with it.
        """
        text = request.encode() if isinstance(request, str) else request
        swallowed = Swallowed(text, replies, self._withdraw)
        self._on_loop(lambda: self._faults.swallows.append(swallowed))
        return swallowed

    def _withdraw(self, swallowed: Swallowed) -> None:
        def withdraw() -> None:
            if swallowed in self._faults.swallows:
                self._faults.swallows.remove(swallowed)

        self._on_loop(withdraw)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._fail)
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"proxy of {self._target_port}", daemon=True
        )
        self._thread.start()
        try:
            self._on_loop(self._listen)
        except OSError:
            self._end_loop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._on_loop(self._stop_listening)
        self._end_loop()
        if self._problem is not None:
            raise self._problem

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _on_loop(self, act: Callable[[], T]) -> T:
        """Do this in the loop's thread, after what had come in on its sockets. Returns when it is done."""

        async def acted() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(acted(), self._loop).result()

    # -- in the loop's thread

    def _listen(self) -> None:
        self._listener = socket.create_server((LOOPBACK, self.port), backlog=1024)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)

    def _stop_listening(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        self._reset_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            link = Link(
                client,
                loop=self._loop,
                faults=self._faults,
                wire=self._wire(),
                chunk_bytes=self._chunk_bytes,
                forget=self._links.discard,
            )
            self._links.add(link)
            if not self._faults.is_silent:
                link.open(self._target_port)

    def _reset_all(self) -> None:
        for link in list(self._links):
            link.reset()

    def _fail(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Something is wrong with the proxy itself: nobody is to wait for it, and its end will tell."""
        self._problem = context.get("exception") or RuntimeError(context["message"])
        self._reset_all()

    def _delay(self, seconds: float) -> None:
        self._faults.delay = seconds

    def _fall_silent(self) -> None:
        self._faults.is_silent = True
        for link in self._links:
            link.freeze()

    def _speak_again(self) -> None:
        self._reset_all()
        self._faults.is_silent = False
