"""Text for a person at a terminal."""

import json
import sys
from datetime import datetime

from app.logging import shortened

_LEVEL_COLOURS = {"warning": "33", "error": "31", "critical": "31"}


def readable(line: str) -> str:
    """A line of our JSON log as a person reads it; any other line as it is."""
    try:
        fields = json.loads(line)
        event, level = fields.pop("event"), fields.pop("level")
        clock = datetime.fromisoformat(fields.pop("time")).astimezone()
    except (ValueError, TypeError, KeyError, AttributeError):
        return line
    logger, exception = fields.pop("logger", ""), fields.pop("exception", None)
    tail = "".join(f" {key}={value}" for key, value in shortened(fields).items())
    text = f"{clock:%H:%M:%S} {coloured(f'{level:7}', _LEVEL_COLOURS.get(level))} {logger}: {event}{tail}"
    return f"{text}\n{exception}" if exception else text


def coloured(text: str, colour: str | None) -> str:
    """In a colour (a number of ANSI's), where there is a terminal to show it."""
    return f"\033[{colour}m{text}\033[0m" if colour and sys.stdout.isatty() else text
