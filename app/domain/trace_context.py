"""W3C Trace Context: whose trace a caller's request belongs to."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

_KNOWN = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = 0x01


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The caller's span. `trace_id`: 32 hex digits, `span_id`: 16. `is_sampled`: the caller records it, perhaps."""

    trace_id: str
    span_id: str
    is_sampled: bool

    @classmethod
    def sent(cls, fields: Sequence[str]) -> Self | None:
        """What a request's header fields of this name say; several say nothing."""
        return cls.parse(fields[0].strip(" \t")) if len(fields) == 1 else None

    @classmethod
    def parse(cls, traceparent: str) -> Self | None:
        """What the header says; None where it says nothing that counts, which is no error of the caller's.

        A later version may add something behind a further hyphen: of that, the recommendation has us read what
        version 00 knows, and of its flags only the one.
        """
        known = _KNOWN.fullmatch(traceparent[:55])
        if known is None:
            return None
        version, trace_id, span_id, flags = known.groups()
        rest = traceparent[55:]
        is_whole = not rest if version == "00" else rest[:1] in ("", "-")
        if not is_whole or version == "ff" or not int(trace_id, 16) or not int(span_id, 16):
            return None
        return cls(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))

    def __str__(self) -> str:
        """As a header of version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{self.is_sampled:02x}"
