"""What a proxy has to understand of a wire protocol: which requests are under way, and where the reply to each ends."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct


@dataclass(frozen=True, slots=True)
class Part:
    """A reply, or as much of one as has arrived.

    `request`: the text of what it answers; empty where the server executes nothing for it, or speaks unasked.
    """

    data: bytes
    request: bytes
    is_end: bool


class Wire(ABC):
    """Follows one connection. Chunks may begin and end anywhere."""

    def __init__(self) -> None:
        self._unanswered: deque[bytes] = deque()
        self._is_followed = True

    def asked(self, chunk: bytes) -> None:
        """Take note of what the client sends, before the server gets it."""
        if self._is_followed:
            self._read_requests(chunk)

    def answered(self, chunk: bytes) -> Iterator[Part]:
        """Divide what the server sends. To be read to its end."""
        start = 0
        for end in self._ends_of_replies(chunk) if self._is_followed else ():
            yield Part(chunk[start:end], self._unanswered.popleft(), is_end=True)
            start = end
        if start < len(chunk):
            yield Part(chunk[start:], self._unanswered[0] if self._unanswered else b"", is_end=not self._unanswered)

    def _stop_following(self) -> None:
        """From here on, requests and replies do not come in pairs."""
        self._is_followed = False
        self._unanswered.clear()

    @abstractmethod
    def _read_requests(self, chunk: bytes) -> None:
        """Add the text of each request that is complete to `_unanswered`."""

    @abstractmethod
    def _ends_of_replies(self, chunk: bytes) -> Iterator[int]:
        """Where in the chunk replies end."""


def anything(reply: bytes) -> bool:
    """Every reply counts."""
    return True


def not_nil(reply: bytes) -> bool:
    """Of Redis: a reply that has something in it counts. A pop that timed out, or a transaction undone, does not."""
    return reply not in (b"$-1\r\n", b"*-1\r\n", b"_\r\n")


_COLLECTIONS = {ord("*"): 1, ord("~"): 1, ord(">"): 1, ord("%"): 2}
"""Kind → values in each of its elements."""
_STRINGS = b"$=!"


class _Values:
    """RESP values in a stream: where each ends, and the strings in it."""

    def __init__(self) -> None:
        self._rest = b""
        self._missing = 1
        self._strings: list[bytes] = []

    def walk(self, chunk: bytes) -> Iterator[tuple[int, list[bytes]]]:
        data, before = self._rest + chunk, len(self._rest)
        at = 0
        while (line_end := data.find(b"\r\n", at)) >= 0:
            kind, after = data[at], line_end + 2
            if kind in _COLLECTIONS:
                self._missing += max(int(data[at + 1 : line_end]), 0) * _COLLECTIONS[kind]
            elif kind not in _STRINGS:
                self._strings.append(data[at:line_end])
            elif (size := int(data[at + 1 : line_end])) >= 0:
                after += size + 2
                if len(data) < after:
                    break
                self._strings.append(data[line_end + 2 : after - 2])
            at = after
            self._missing -= 1
            if not self._missing:
                yield at - before, self._strings
                self._missing, self._strings = 1, []
        self._rest = data[at:]


class RedisWire(Wire):
    """A request's text is its words with spaces between them. A transaction is one request, from MULTI to EXEC.

    A connection that subscribes or monitors is not followed any further.
    """

    def __init__(self) -> None:
        super().__init__()
        self._requests = _Values()
        self._replies = _Values()
        self._transaction: list[bytes] = []

    def _read_requests(self, chunk: bytes) -> None:
        for _, words in self._requests.walk(chunk):
            if not self._is_followed:
                break
            self._read_request(words[0].upper(), b" ".join(words))

    def _read_request(self, command: bytes, text: bytes) -> None:
        match command:
            case b"SUBSCRIBE" | b"PSUBSCRIBE" | b"SSUBSCRIBE" | b"MONITOR":
                self._stop_following()
                return
            case b"MULTI":
                self._transaction = [text]
            case b"DISCARD":
                self._transaction = []
            case b"EXEC":
                text = b"\n".join([*self._transaction, text])
                self._transaction = []
            case _ if self._transaction:
                self._transaction.append(text)
        # What is only queued gets an answer too, but it is executed by EXEC.
        self._unanswered.append(b"" if self._transaction else text)

    def _ends_of_replies(self, chunk: bytes) -> Iterator[int]:
        return (end for end, _ in self._replies.walk(chunk))


_UNTYPED = Struct("!II")
_HEADER = Struct("!cI")
_SSL, _GSS, _CANCEL = 80877103, 80877104, 80877102
_REFUSED = b"N"


class _Messages:
    """Typed messages in a stream: where each ends, its kind, its body."""

    def __init__(self) -> None:
        self._rest = b""

    def walk(self, chunk: bytes) -> Iterator[tuple[int, bytes, bytes]]:
        data, before = self._rest + chunk, len(self._rest)
        at = 0
        while len(data) - at >= _HEADER.size:
            kind, length = _HEADER.unpack_from(data, at)
            end = at + 1 + length  # the length counts itself, not the kind
            if len(data) < end:
                break
            yield end - before, kind, data[at + _HEADER.size : end]
            at = end
        self._rest = data[at:]


class PostgresWire(Wire):
    """A request is all that is executed up to a Sync, or a simple query; its text is the SQL, as it was sent.

    The text of a prepared statement is known from its Parse: what is executed later carries only its name. A reply ends
    at ReadyForQuery. A connection that is encrypted, or cancels a statement, is not followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._requests = _Messages()
        self._replies = _Messages()
        self._startup: bytes | None = b""
        """What there is of an untyped message; None once the connection has started."""
        self._is_negotiating = False
        self._statements: dict[bytes, bytes] = {}
        self._portals: dict[bytes, bytes] = {}
        self._executed: list[bytes] = []

    def _read_requests(self, chunk: bytes) -> None:
        if self._startup is not None:
            chunk = self._read_startup(self._startup + chunk)
        for _, kind, body in self._requests.walk(chunk):
            self._read_message(kind, body)

    def _read_startup(self, data: bytes) -> bytes:
        """Read the untyped messages that a connection starts with. Returns what comes after them."""
        while len(data) >= _UNTYPED.size:
            length, code = _UNTYPED.unpack_from(data)
            if code == _CANCEL:
                self._stop_following()
                return b""
            if len(data) < length:
                break
            data = data[length:]
            if code not in (_SSL, _GSS):
                self._startup = None
                self._unanswered.append(b"")  # the first ReadyForQuery is the answer to this
                return data
            self._is_negotiating = True
        self._startup = data
        return b""

    def _read_message(self, kind: bytes, body: bytes) -> None:
        match kind:
            case b"P":  # Parse
                name, text, _ = body.split(b"\0", 2)
                self._statements[name] = text
            case b"B":  # Bind
                portal, name, _ = body.split(b"\0", 2)
                self._portals[portal] = self._statements.get(name, b"")
            case b"E":  # Execute
                portal, _, _ = body.partition(b"\0")
                self._executed.append(self._portals.get(portal, b""))
            case b"C" if body.startswith(b"S"):  # Close, of a statement
                self._statements.pop(body[1:-1], None)
            case b"Q":  # a simple query
                self._executed.append(body[:-1])
        if kind in b"QSF":  # a simple query, Sync, a function call: ReadyForQuery answers each of them
            self._unanswered.append(b"\n".join(self._executed))
            self._executed = []

    def _ends_of_replies(self, chunk: bytes) -> Iterator[int]:
        if self._is_negotiating:  # one byte, and the client says nothing before it has that
            self._is_negotiating = False
            if chunk != _REFUSED:
                self._stop_following()
            return
        for end, kind, _ in self._replies.walk(chunk):
            if kind == b"Z":  # ReadyForQuery
                yield end
