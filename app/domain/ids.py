"""Identifiers."""

import secrets
import time
from uuid import UUID


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562, section 5.7): ids made later sort later, to the millisecond."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)


def first_id_at(seconds: float) -> UUID:
    """The smallest id that can be made at this time: seconds since 1970."""
    return UUID(int=max(0, int(seconds * 1000)) << 80)
