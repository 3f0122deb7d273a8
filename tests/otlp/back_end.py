"""A stand-in for a tracing back end that runs: what it has been sent, and what is wrong with that."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from uuid import UUID

from app.devstack.ports import LOOPBACK
from tests.otlp.fronts import FRONTS, Kind, wrong_with_scores, wrong_with_spans
from tests.otlp.server import Mode, Server
from tests.otlp.spans import Request, Span, spans_of

T = TypeVar("T")


class BackEnd:
    """A receiver that runs. `mode` may be changed at any time; `requests`: all, also those that were not taken."""

    def __init__(self, kind: Kind, port: int = 0) -> None:
        self.kind = kind
        self.mode = Mode.OK
        self.requests: list[Request] = []
        self.taken: list[Request] = []
        self.complaints: list[str] = []
        self.closed = threading.Event()
        self._server = Server(self, port)
        self.port = self._server.server_port
        self.address = f"http://{LOOPBACK}:{self.port}"
        self.front = FRONTS[kind](self.address)
        self._serve()

    @property
    def settings(self) -> dict[str, str]:
        """Environment variables that make the service send its traces here."""
        return dict(self.front.settings)

    def spans(self, trace_id: str | UUID | None = None) -> list[Span]:
        """What it has taken, in the order of arrival: of one trace (or run: its id is the trace's), or all."""
        wanted = None if trace_id is None else _hex(trace_id)
        spans = [span for request in list(self.taken) if self._has_spans(request) for span in spans_of(request)]
        return [span for span in spans if wanted in (None, span.trace_id)]

    def scores(self, trace_id: str | UUID | None = None) -> list[dict[str, Any]]:
        """The scores it has taken (only Langfuse has any)."""
        wanted = None if trace_id is None else _hex(trace_id)
        scores = [
            score
            for request in list(self.taken)
            if request.path == self.front.scores_path
            for score in json.loads(request.plain)
        ]
        return [score for score in scores if wanted in (None, score.get("traceId"))]

    def until(self, trace_id: str | UUID | None, count: int, *, seconds: float = 10) -> list[Span]:
        """The spans of a trace, as soon as there are so many."""
        return _until(lambda: self.spans(trace_id), count, "spans", seconds)

    def until_root(self, trace_id: str | UUID, *, seconds: float = 10) -> list[Span]:
        """The spans of a trace, as soon as its root is there."""
        _until(lambda: [s for s in self.spans(trace_id) if s.parent_id is None], 1, "roots", seconds)
        return self.spans(trace_id)

    def until_scores(self, trace_id: str | UUID | None, count: int, *, seconds: float = 10) -> list[dict[str, Any]]:
        return _until(lambda: self.scores(trace_id), count, "scores", seconds)

    def until_requests(self, count: int, *, seconds: float = 10) -> list[Request]:
        """Everything that was asked of it, taken or not, as soon as it is so much."""
        return _until(lambda: list(self.requests), count, "requests", seconds)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nobody listens on its port."""
        self._server.shutdown()
        self._server.server_close()
        try:
            yield
        finally:
            self._server = Server(self, self.port)
            self._serve()

    def complaint(self, request: Request) -> str | None:
        """Why the real back end would not take this."""
        headers = request.headers
        wrong = [
            f"{name}: {headers.get(name)!r}" for name, value in self._expected(request) if headers.get(name) != value
        ]
        if request.method != "POST" or request.path not in (self.front.traces_path, self.front.scores_path):
            wrong.append(f"{request.method} {request.path}")
        elif self._has_spans(request):
            wrong += wrong_with_spans(request)
        else:
            wrong += wrong_with_scores(request)
        return "; ".join(wrong) or None

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def _has_spans(self, request: Request) -> bool:
        return request.path == self.front.traces_path

    def _expected(self, request: Request) -> Sequence[tuple[str, str]]:
        headers = {**self.front.headers}
        if not self._has_spans(request):
            headers.pop("x-langfuse-ingestion-version", None)
        return list(headers.items())

    def _serve(self) -> None:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def _hex(trace_id: str | UUID) -> str:
    return UUID(str(trace_id)).hex


def _until(look: Callable[[], list[T]], count: int, what: str, seconds: float) -> list[T]:
    until = time.monotonic() + seconds
    while len(found := look()) < count:
        assert time.monotonic() < until, f"{len(found)} {what} and not {count} within {seconds:g} s"
        time.sleep(0.02)
    return found
