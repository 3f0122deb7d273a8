"""Logs: one JSON line an event on standard error, or a readable line on a terminal.

`bind(run_id=…)` adds fields to every line that is logged in the same task.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

_bound: ContextVar[dict[str, Any] | None] = ContextVar("log_fields", default=None)


@contextmanager
def bind(**fields: Any) -> Iterator[None]:
    """Add fields to every line logged inside this block, in this task and those it starts."""
    token = _bound.set({**(_bound.get() or {}), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "bound", {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class _TerminalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {**getattr(record, "bound", {}), **getattr(record, "fields", {})}
        tail = "".join(f" {key}={value}" for key, value in fields.items())
        clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        line = f"{clock} {record.levelname.lower():7} {record.name}: {record.getMessage()}{tail}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _keep_bound_fields(record: logging.LogRecord) -> bool:
    record.bound = _bound.get() or {}
    return True


def configure_logging(level: str) -> None:
    """Send everything from `level` up to standard error. Called once, by a process' entry point."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_TerminalFormatter() if sys.stderr.isatty() else _JsonFormatter())
    handler.addFilter(_keep_bound_fields)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Libraries that report each request or job at info; what matters of that is logged by us.
    for noisy in ("httpx", "httpx2", "openai", "rq", "rq.worker", "uvicorn.access", "alembic"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
