"""Text for a person's terminal. Models and customers wrote much of it: nothing may move the cursor or hide the rest."""

import json
import textwrap
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

WIDTH = 100


def printable(text: str) -> str:
    """In one line, with an escape (\\n, \\x1b, \\u202e) in place of every character that is a command, not a sign."""
    return "".join(char if _is_a_sign(char) else char.encode("unicode_escape").decode() for char in text)


def _is_a_sign(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


def indented(text: str) -> str:
    """Its lines, two columns to the right, wrapped at `WIDTH`."""
    lines = [printable(line) for line in text.expandtabs().split("\n")]
    return "\n".join(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="  ") for line in lines)


def entry(name: str, text: str) -> str:
    """A name of up to eight characters and, beside it, its text in one paragraph."""
    return textwrap.fill(printable(text), WIDTH, initial_indent=f"  {name:8} ", subsequent_indent=" " * 11)


def pretty(value: Any) -> str:
    """JSON over several lines, two columns to the right."""
    lines = json.dumps(value, ensure_ascii=False, indent=2).split("\n")
    return "\n".join(f"  {printable(line)}" for line in lines)


def in_short(value: Any, width: int) -> str:
    """JSON, or the text itself, in one line of at most `width` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = printable(" ".join(text.split()))
    return text if len(text) <= width else f"{text[: width - 1]}…"


def call(name: str, arguments: Any, width: int) -> str:
    """As a call is written in Python; where the model's arguments are no object, what it wrote."""
    if not isinstance(arguments, Mapping):
        return in_short(f"{name}({arguments})", width)
    values = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    return in_short(f"{name}({', '.join(values)})", width)


def clock(moment: str) -> str:
    """A time of the API's, in UTC, to the second."""
    return f"{datetime.fromisoformat(moment).astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"


def span(length: timedelta) -> str:
    """Its size in the largest unit that it fills, without regard to its sign: 40 s, 12 min, 3 h, 2 d."""
    seconds = abs(length.total_seconds())
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"
