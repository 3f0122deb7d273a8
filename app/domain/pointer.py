"""Which place in a request's JSON is wrong, as a JSON pointer (RFC 6901): `#/limits/max_steps`."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import JsonValue

from app.domain.canonical import UNSTORABLE
from app.domain.errors import FieldError

MAX_DEPTH = 64
"""Arrays and objects in each other that a request may have."""
MAX_ERRORS = 20
"""How many wrong places one answer names: a large body may have as many as it has values."""


def pointer(path: Sequence[str | int], under: str = "#") -> str:
    return "".join([under, *("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)])


def field_errors(problems: Sequence[Any], under: str = "#") -> tuple[FieldError, ...]:
    """What pydantic found (`ValidationError.errors()`), each at its place."""
    return tuple(
        FieldError(pointer([part for part in problem["loc"] if part != "[key]"], under), in_words(problem))
        for problem in problems[:MAX_ERRORS]
    )


def in_words(problem: Any) -> str:
    """What pydantic found, for somebody who knows neither pydantic nor our classes."""
    match problem["type"]:
        case "model_type" | "dict_type" | "model_attributes_type":
            return "must be an object"
        case "string_pattern_mismatch" if str(problem["msg"]).endswith(r"'\S'"):
            return "must hold some text"
        case "value_error":
            return str(problem["msg"]).removeprefix("Value error, ")
        case _:
            return str(problem["msg"])


def unstorable(value: JsonValue, under: str = "#") -> Iterator[FieldError]:
    """The places that Postgres refuses in JSON, or that nest too deep: without a name for what is inside those."""
    # A list instead of recursion, and paths as linked pairs: a body of 1 MiB may hold half a million values.
    todo: list[tuple[Any, Any, int]] = [(value, None, 0)]
    while todo:
        item, path, depth = todo.pop()
        if isinstance(item, str):
            if UNSTORABLE.search(item):
                yield FieldError(_unroll(path, under), "holds a NUL character or a lone surrogate")
        elif isinstance(item, float):
            if not math.isfinite(item):
                yield FieldError(_unroll(path, under), "is not a finite number")
        elif isinstance(item, dict | list):
            if depth == MAX_DEPTH:
                yield FieldError(_unroll(path, under), f"is nested deeper than {MAX_DEPTH} levels")
                continue
            if isinstance(item, dict) and any(UNSTORABLE.search(name) for name in item):
                yield FieldError(_unroll(path, under), "has a name with a NUL character or a lone surrogate")
                continue
            children = item.items() if isinstance(item, dict) else enumerate(item)
            todo.extend((child, (path, name), depth + 1) for name, child in children)


def _unroll(path: Any, under: str) -> str:
    parts: list[str | int] = []
    while path is not None:
        path, part = path
        parts.append(part)
    return pointer(parts[::-1], under)
