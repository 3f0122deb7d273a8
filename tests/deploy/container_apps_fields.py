"""Asks the SDK of Azure Container Apps about a manifest. Run by the Python of .venv-deploy, where that package is.

Reads JSON: the name of a model and a manifest of it. Prints the paths that the model does not have, one a line.
"""

import json
import sys
import typing
from collections.abc import Iterator
from enum import Enum

from azure.mgmt.appcontainers import models  # type: ignore[import-not-found,unused-ignore]

MODULE = sys.modules[models.ContainerApp.__module__]
NAMES = {"_models": models, **vars(MODULE)}


def fields(model: type) -> dict[str, object]:
    """Their types, by their names in the REST API."""
    found: dict[str, object] = {}
    for base in reversed(model.__mro__):
        for attribute, kind in vars(base).get("__annotations__", {}).items():
            field: typing.Any = vars(base).get(attribute)
            if hasattr(field, "_rest_name_input"):
                found[field._rest_name_input or attribute] = resolved(kind)
    return found


def resolved(kind: object) -> object:
    """Types of other models are named, not given."""
    name = kind.__forward_arg__ if isinstance(kind, typing.ForwardRef) else kind
    return eval(name, NAMES) if isinstance(name, str) else kind


def unknown(kind: object, value: object, path: str) -> Iterator[str]:
    """The paths from `value` on that a type does not have."""
    kind = resolved(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Union:
        yield from of_union([resolved(each) for each in arguments if each is not type(None)], value, path)
    elif origin is list and isinstance(value, list):
        for number, each in enumerate(value):
            yield from unknown(arguments[0], each, f"{path}[{number}]")
    elif origin is dict and isinstance(value, dict):
        for name, each in value.items():
            yield from unknown(arguments[1], each, f"{path}.{name}")
    elif isinstance(kind, type) and kind.__module__ == MODULE.__name__ and isinstance(value, dict):
        known = fields(kind)
        assert known, kind
        for name, each in value.items():
            yield from unknown(known[name], each, f"{path}.{name}") if name in known else [f"{path}.{name}"]
    elif kind is float and isinstance(value, int):
        return
    elif type(value) is not kind:
        yield f"{path}: {value!r} is not {kind}"


def of_union(possible: list[object], value: object, path: str) -> Iterator[str]:
    """`Optional[X]`, or the name of a member of an enumeration."""
    for each in possible:
        if isinstance(each, type) and issubclass(each, Enum):
            if value not in [member.value for member in each]:
                yield f"{path}: {value!r} is no {each.__name__}"
            return
    yield from unknown(possible[0], value, path)


name, manifest = json.load(sys.stdin)
print(*unknown(getattr(models, name), manifest, name), sep="\n")
