"""Logs: one JSON line an event on standard error, or a readable line on a terminal.

`bind(run_id=…)` adds fields to every line that is logged in the same task. No line holds a secret, an e-mail address, a
card number or a character that would do something to a terminal: whatever was logged, by whomever.
"""

import json
import logging
import math
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from types import TracebackType
from typing import Any
from uuid import UUID

from pydantic import JsonValue

from app.redaction import Redaction, hide_in

_COMMANDS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
"""Not signs: controls, ends of lines that only some know, what turns the direction of text or cannot be seen."""
_DEEPEST = 8
"""Values inside of values; what is deeper is shown as Python writes it."""
_ID_ON_TERMINAL = 8
"""Characters of a request's id that are enough to find it."""

_SHORT = 64
_REMEMBERED = 2_048
"""So many texts of up to so many characters are looked through only once."""

logger = logging.getLogger(__name__)

_bound: ContextVar[dict[str, Any] | None] = ContextVar("log_fields", default=None)


@contextmanager
def bind(**fields: Any) -> Iterator[None]:
    """Add fields to every line logged inside this block, in this task and those it starts."""
    token = _bound.set({**(_bound.get() or {}), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def add(**fields: Any) -> None:
    """Add fields that are known only now to the block of `bind` that this is in; outside of one, to nothing."""
    bound = _bound.get()
    if bound is not None:
        bound.update(fields)


def about_run(run_id: UUID) -> None:
    """Add the ids of the run that this block turns out to be about."""
    add(run_id=str(run_id), trace_id=run_id.hex)


def bound_fields() -> Mapping[str, Any]:
    """What a line that is logged here would have added to it."""
    return _bound.get() or {}


class _Formatter(logging.Formatter, ABC):
    """`hide`: applied to all text of a line."""

    def __init__(self, hide: Callable[[str], str]) -> None:
        super().__init__()
        # Names of fields and loggers, and ids, are the same in many lines.
        of_short = lru_cache(_REMEMBERED)(hide)
        self._hide: Callable[[str], str] = lambda text: of_short(text) if len(text) <= _SHORT else hide(text)

    def format(self, record: logging.LogRecord) -> str:
        try:
            return self._line(record, record.getMessage(), _fields(record))
        except Exception as error:  # noqa: BLE001 - whatever a value raises that is written as text
            # Logging's own report of it would not be one of our lines.
            return self._line(record, f"not a line that can be written: {record.msg!r:.200}", {"error": repr(error)})

    @abstractmethod
    def _line(self, record: logging.LogRecord, event: str, fields: dict[str, Any]) -> str: ...

    def _exception(self, record: logging.LogRecord) -> str | None:
        return self.formatException(record.exc_info) if record.exc_info else None


class _JsonFormatter(_Formatter):
    def _line(self, record: logging.LogRecord, event: str, fields: dict[str, Any]) -> str:
        line: dict[str, Any] = {"level": record.levelname.lower(), "logger": record.name, "event": event, **fields}
        if (exception := self._exception(record)) is not None:
            line["exception"] = exception
        shown = hide_in(_plain(line), self._hide)
        assert isinstance(shown, dict)
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        # Hidden before this is JSON: what it may replace could hold a quote.
        return _escaped(json.dumps({"time": time, **shown}, ensure_ascii=False))


class _TerminalFormatter(_Formatter):
    def _line(self, record: logging.LogRecord, event: str, fields: dict[str, Any]) -> str:
        tail = "".join(f" {key}={value}" for key, value in shortened(fields).items())
        clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        line = self._hide(f"{record.levelname.lower():7} {record.name}: {event}{tail}")
        trace = self._hide(self._exception(record) or "").splitlines()
        # Indented: what an exception says must not look like a line of ours.
        return "\n".join([f"{clock} {_escaped(line)}", *(f"  {_escaped(part)}" for part in trace)])


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {**getattr(record, "bound", {}), **getattr(record, "fields", {})}
    return {key: value for key, value in fields.items() if value is not None}


def shortened(fields: dict[str, Any]) -> dict[str, Any]:
    """What somebody who looks on needs: the trace's id is the run's."""
    shown = {key: value for key, value in fields.items() if key != "trace_id" or "run_id" not in fields}
    if isinstance(request_id := shown.get("request_id"), str):
        shown["request_id"] = request_id[:_ID_ON_TERMINAL]
    return shown


def _plain(value: object, depth: int = 0) -> JsonValue:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case dict() if depth < _DEEPEST:
            return {str(name): _plain(item, depth + 1) for name, item in value.items()}
        case list() | tuple() | set() | frozenset() if depth < _DEEPEST:
            return [_plain(item, depth + 1) for item in value]
        case _:
            return str(value)


def _escaped(text: str) -> str:
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _keep_bound_fields(record: logging.LogRecord) -> bool:
    record.bound = bound_fields()
    return True


def configure_logging(level: str, *, secrets: Iterable[str] = (), patterns: Iterable[str] = ()) -> None:
    """Send everything from `level` up to standard error, without these secrets and what the patterns name.

    Also what libraries and Python itself have to say, uncaught exceptions included. Called once, by an entry point.
    """
    hide = Redaction(secrets, patterns).hide_personal
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_TerminalFormatter(hide) if sys.stderr.isatty() else _JsonFormatter(hide))
    handler.addFilter(_keep_bound_fields)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Libraries that report each request or job at info; what matters of that is logged by us.
    for noisy in ("httpx2", "openai", "rq", "rq.worker", "uvicorn.access", "alembic"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    # Langfuse's SDK gives it a handler of its own, and it never has anything else to report.
    logging.getLogger("httpx").disabled = True
    # Where nobody can be told any more, what should have been logged would be written as it is.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda died: _log_uncaught(died.exc_type, died.exc_value, died.exc_traceback)
    sys.unraisablehook = lambda lost: _log_uncaught(lost.exc_type, lost.exc_value, lost.exc_traceback)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if error is None or issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    logger.critical("uncaught exception", exc_info=(kind, error, traceback))
