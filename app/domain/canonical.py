"""One byte string for one JSON value, for hashes."""

import hashlib
import json

from pydantic import JsonValue


def canonical_json(value: JsonValue) -> str:
    """Sorted keys, no spaces, UTF-8 as it is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: JsonValue) -> str:
    """SHA-256 (hex) of the canonical form."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
