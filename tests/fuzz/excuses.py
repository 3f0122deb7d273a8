"""Answers to valid requests that no schema can foresee. Everything else that schemathesis finds counts."""

import json
import re
from itertools import count
from typing import Any

import schemathesis
from schemathesis.core.failures import Failure

MAX_KEY = 240
UNFORESEEABLE = {
    "idempotency-mismatch": "whether an Idempotency-Key was used before is not in the request that has it",
    "unpriced-model": "which models have a price is the operators' affair; one of the tests' agents has none",
}
UNFORESEEABLE_PLACES = {
    ("this cannot be decided here", "#/decision"): "which decisions are possible, the review says",
    ("these are not arguments that", "#/arguments"): "what arguments are possible, the review's tool says",
    ("the run has reached its", "#/arguments"): "which limit may be raised, the review says",
    ("this is no ", "#/arguments"): "which limit may be raised, the review says",
    ("a limit that was reached can only be raised", "#/arguments"): "how high the limit was, the review says",
    ("this is not what agent", "#/response"): "what the run has to answer, the review's agent says",
    ("messages cannot be sent to this address", "#/url"): "which hosts are on the public internet is no matter of form",
    ("the body holds what cannot be stored", "#"): "JSON Schema has no word for NUL inside of any JSON there may be",
}
"""By how the detail begins, and where all the errors are."""


_numbers = count()


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Gives valid submissions an Idempotency-Key of their own: of one key, only the first would get any further."""
    key = case.headers.get("idempotency-key")
    is_valid = case.meta is not None and case.meta.generation.mode.is_positive
    if is_valid and isinstance(key, str) and len(key) < MAX_KEY:
        case.headers["idempotency-key"] = f"{key}{next(_numbers)}"


@schemathesis.hook
def filter_failure(
    context: schemathesis.HookContext, failure: Failure, case: schemathesis.Case[Any], response: schemathesis.Response
) -> bool:
    """Keep the failure?"""
    is_refusal_of_valid_data = type(failure).__name__ == "RejectedPositiveData" and response.status_code == 422
    return not (is_refusal_of_valid_data and _is_unforeseeable(json.loads(response.content)))


def _is_unforeseeable(problem: Any) -> bool:
    pointers = [error["pointer"] for error in problem.get("errors", [])]
    return problem["type"].rpartition(":")[2] in UNFORESEEABLE or any(
        problem["detail"].startswith(detail) and all(re.match(f"{place}(/|$)", pointer) for pointer in pointers)
        for detail, place in UNFORESEEABLE_PLACES
    )
