"""Logs: one JSON line an event on standard error, or a readable line on a terminal.

`bind(run_id=…)` adds fields to every line that is logged in the same task. No line holds a secret, or a character that
would do something to a terminal: whatever was logged, by whomever.
"""

import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

HIDDEN = "[hidden]"
MIN_SECRET = 10
"""Characters. To hide a shorter one wherever it stands would make logs hard to read, and tell what it is."""

_OURS = r"ask_[0-9A-Za-z]{6,}_[0-9A-Za-z_-]{6,}|whsec_[0-9A-Za-z+/=_-]{6,}"
_IN_ADDRESS = r"""(?<=://)[^/\s:@"'\\]*:[^/\s"'\\]+(?=@)"""
_TELLTALES = ("ask_", "whsec_", "://")
_COMMANDS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
"""Not signs: controls, ends of lines that only some know, what turns the direction of text or cannot be seen."""

_bound: ContextVar[dict[str, Any] | None] = ContextVar("log_fields", default=None)


@contextmanager
def bind(**fields: Any) -> Iterator[None]:
    """Add fields to every line logged inside this block, in this task and those it starts."""
    token = _bound.set({**(_bound.get() or {}), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


class Redaction:
    """Hides secrets in text: these, our API keys, webhooks' secrets, and passwords in addresses."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True)
        self._telltales = (*_TELLTALES, *known)
        self._pattern = re.compile("|".join([*map(re.escape, known), _OURS, _IN_ADDRESS]))

    def __call__(self, text: str) -> str:
        # Looking for plain text first takes a tenth of the time, and nearly every line holds none of it.
        return self._pattern.sub(HIDDEN, text) if any(told in text for told in self._telltales) else text


def _forms(secret: str) -> Iterator[str]:
    """How the secret may be written: as it is, line by line, by Python, in an address, in JSON."""
    for part in (secret, *secret.splitlines()):
        if len(part) >= MIN_SECRET:
            yield from (part, repr(part)[1:-1], quote(part, safe=""))
            yield from (json.dumps(part, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False))


without_secrets = Redaction()
"""Hides what looks like a secret of ours, for what goes elsewhere than into the log."""


def _escaped(text: str) -> str:
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _JsonFormatter(logging.Formatter):
    def __init__(self, redact: Redaction) -> None:
        super().__init__()
        self._redact = redact

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
        # Outside of strings there is nothing that either of them would replace, so it stays the same JSON.
        return _escaped(self._redact(json.dumps(line, default=str, ensure_ascii=False)))


class _TerminalFormatter(logging.Formatter):
    def __init__(self, redact: Redaction) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        fields = {**getattr(record, "bound", {}), **getattr(record, "fields", {})}
        tail = "".join(f" {key}={value}" for key, value in fields.items())
        clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        line = _escaped(f"{clock} {record.levelname.lower():7} {record.name}: {record.getMessage()}{tail}")
        trace = self.formatException(record.exc_info).split("\n") if record.exc_info else []
        # Indented: what an exception says must not look like a line of ours.
        return self._redact("\n".join([line, *(f"  {_escaped(part)}" for part in trace)]))


def _keep_bound_fields(record: logging.LogRecord) -> bool:
    record.bound = _bound.get() or {}
    return True


def configure_logging(level: str, *, secrets: Iterable[str] = ()) -> None:
    """Send everything from `level` up to standard error, without these secrets. Called once, by an entry point."""
    redact = Redaction(secrets)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_TerminalFormatter(redact) if sys.stderr.isatty() else _JsonFormatter(redact))
    handler.addFilter(_keep_bound_fields)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Libraries that report each request or job at info; what matters of that is logged by us.
    for noisy in ("httpx", "httpx2", "openai", "rq", "rq.worker", "uvicorn.access", "alembic"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
