"""One byte string for one JSON value, for hashes."""

import hashlib
import json
import math
import re

import rfc8785
from pydantic import JsonValue

UNSTORABLE = re.compile("[\0\ud800-\udfff]")
"""What Postgres refuses in a JSON string: NUL and lone surrogates."""


def canonical_json(value: JsonValue) -> str:
    """RFC 8785 (JSON Canonicalization Scheme): anybody gets the same text, in any language.

    An integer beyond 2^53, which that scheme has no exact form for, keeps its digits.
    """
    try:
        return rfc8785.dumps(value).decode()
    except rfc8785.IntegerDomainError:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: JsonValue) -> str:
    """SHA-256 (hex) of the canonical form."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def storable(value: JsonValue) -> JsonValue:
    """The value without what Postgres refuses in JSON: NUL and lone surrogates become U+FFFD, NaN and infinity null.

    For what models and tools say; a request that holds such things is refused instead.
    """
    if isinstance(value, str):
        return UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(storable(key)): storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [storable(item) for item in value]
    return value


def storable_text(text: str) -> str:
    """`storable` for a string."""
    return str(storable(text))
