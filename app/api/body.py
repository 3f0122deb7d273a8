"""A request's JSON body: parsed, refused where a later part could not take it, and validated."""

import json
import math
import re
from itertools import islice
from typing import Any, Generic, NoReturn, TypeVar

from pydantic import BaseModel, JsonValue, ValidationError
from starlette.requests import Request

from app.api.errors import UnsupportedMediaType
from app.domain.errors import InvalidRequest
from app.domain.pointer import MAX_DEPTH, MAX_ERRORS, field_errors, unstorable

MAX_DIGITS = 1_000
"""Of an integer. Python itself refuses to print one with more than 4,300."""
MAX_VALUES = 20_000
"""In one body, names not counted. 1 MiB has room for half a million, and all others would wait seconds for that."""
_STRINGS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""Matches wherever there is a quotation mark, also where nothing closes it, so that nothing is looked at twice."""

EXACT = 2**53
"""Up to here a float holds every integer."""

Model = TypeVar("Model", bound=BaseModel)


class JsonBody(Generic[Model]):
    """A dependency that gives the body as a `Model`. The framework would parse it before it knows who is asking.

    Raises `UnsupportedMediaType`, `InvalidRequest`, and what `BodyLimit` raises.
    """

    def __init__(self, model: type[Model]) -> None:
        self._model = model

    async def __call__(self, request: Request) -> Model:
        body = await request.body()
        if not body:
            raise InvalidRequest("the body is empty")
        _check_media_type(request.headers.get("content-type", ""))
        _check_coding(request.headers.get("content-encoding", ""))
        value = _parse(body)
        if not isinstance(value, dict):
            raise InvalidRequest("the body must be a JSON object")
        try:
            return self._model.model_validate(value)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False, include_input=False)
            raise InvalidRequest("the body is not valid", errors=field_errors(problems)) from None


def _check_media_type(content_type: str) -> None:
    media_type, _, _ = content_type.partition(";")
    kind, _, subtype = media_type.strip().lower().partition("/")
    if kind != "application" or not (subtype == "json" or subtype.endswith("+json")):
        raise UnsupportedMediaType("send Content-Type: application/json")


def _check_coding(content_encoding: str) -> None:
    """Nothing is unpacked here, so a few bytes never become many."""
    if content_encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("send the body without Content-Encoding", headers={"Accept-Encoding": "identity"})


def _parse(body: bytes) -> JsonValue:
    try:
        text = body.decode()
        if _values_at_most(text) > MAX_VALUES and _values_at_most(_STRINGS.sub("", text)) > MAX_VALUES:
            raise InvalidRequest(f"a body may hold {MAX_VALUES} values")
        value: JsonValue = json.loads(
            text, parse_int=_int, parse_float=_float, parse_constant=_constant, object_pairs_hook=_object
        )
    except RecursionError:
        raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    # Odd characters can only come in as an escape, depth only by brackets: most bodies need no second look.
    if "\\u" in text or text.count("[") + text.count("{") > MAX_DEPTH:
        faults = tuple(islice(unstorable(value), MAX_ERRORS))
        if faults:
            raise InvalidRequest("the body holds what cannot be stored", errors=faults)
    return value


def _values_at_most(text: str) -> int:
    """Each but the first stands behind one of these, which may also stand in strings."""
    return 1 + text.count(",") + text.count("[") + text.count("{")


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer may have {MAX_DIGITS} digits")
    return int(digits)


def _float(digits: str) -> float | int:
    """JSON has one kind of number: 1.0 is the integer 1, wherever that is asked for."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return int(value) if value.is_integer() and abs(value) < EXACT else value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a name that comes twice: two readers of such a body may see two different requests."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has the same name twice")
    return value
