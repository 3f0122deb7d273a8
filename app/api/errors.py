"""Errors as RFC 9457 problem+json. Every type is described in `docs/problems.md`.

RequestError (app.domain.errors)
├── NotHttp                 400
├── MethodNotAllowed        405
├── RequestTimeout          408
├── BodyTooLarge            413
├── UnsupportedMediaType    415
├── HeadTooLarge            431
└── InternalError           500: how a bug looks from outside
"""

import json
import logging
from urllib.parse import quote
from uuid import UUID

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from app.domain.errors import FieldError, InvalidRequest, NotFound, RequestError, Unavailable
from app.domain.pointer import MAX_ERRORS, in_words
from app.logging import bound_fields
from app.redaction import without_secrets

PROBLEM_JSON = "application/problem+json"
RETRY_AFTER_SECONDS = 1

logger = logging.getLogger(__name__)


class NotHttp(RequestError):
    status = 400
    problem = "bad-request"
    title = "Bad request"


class MethodNotAllowed(RequestError):
    status = 405
    problem = "method-not-allowed"
    title = "Not possible with this method"


class RequestTimeout(RequestError):
    """The client took too long to send its request. The rest of it is not waited for."""

    status = 408
    problem = "request-timeout"
    title = "The request took too long to arrive"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Connection": "close"})


class BodyTooLarge(RequestError):
    status = 413
    problem = "body-too-large"
    title = "The body is too large"


class UnsupportedMediaType(RequestError):
    status = 415
    problem = "unsupported-media-type"
    title = "The body must be JSON, as it is"


class HeadTooLarge(RequestError):
    status = 431
    problem = "head-too-large"
    title = "The head of the request is too large"


class InternalError(RequestError):
    status = 500
    problem = "internal-error"
    title = "Something went wrong here"


def problem_type(error: RequestError | type[RequestError]) -> str:
    """The stable identifier that clients compare."""
    return f"urn:agent-service:problem:{error.problem}"


def problem_response(request: Request, error: RequestError) -> Response:
    request.app.state.services.metrics.count_refusal(type(error))
    run_id = bound_fields().get("run_id")
    body = problem_body(error, path=request.scope["path"], request_id=request.state.request_id, run_id=run_id)
    return Response(body, status_code=error.status, headers=error.headers, media_type=PROBLEM_JSON)


def problem_body(error: RequestError, *, path: str, request_id: str, run_id: str | None = None) -> bytes:
    """The document. Whatever of it the caller has sent, a secret does not come back in it.

    `run_id`: of the run that the request was about.
    """
    problem: dict[str, object] = {
        "type": problem_type(error),
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": quote(path),
        "request_id": request_id,
    }
    if run_id:
        problem |= {"run_id": run_id, "trace_id": UUID(run_id).hex}
    if error.errors:
        problem["errors"] = [{"pointer": place.pointer, "detail": place.detail} for place in error.errors]
    return without_secrets(json.dumps(problem)).encode()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return problem_response(request, error)


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return problem_response(request, NotFound("there is nothing at this path"))
    if error.status_code == 405:
        # The framework names the methods of the first route that has this path; others may follow.
        path = getattr(request.scope.get("route"), "path", None)
        documented = request.app.openapi()["paths"].get(path, {})
        allowed = ", ".join(map(str.upper, documented)) or (error.headers or {}).get("Allow", "GET")
        detail = f"{request.method} is not possible here; {allowed} is"
        return problem_response(request, MethodNotAllowed(detail, headers={"Allow": allowed}))
    raise error


async def _invalid_parameter(request: Request, error: Exception) -> Response:
    """A parameter in path, query or headers; bodies are validated in `app.api.body`."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if any(problem["loc"][0] == "path" for problem in problems):
        return problem_response(request, NotFound("there is nothing with this id"))
    errors = tuple(
        FieldError("/".join(map(str, problem["loc"])), in_words(problem)) for problem in problems[:MAX_ERRORS]
    )
    return problem_response(request, InvalidRequest("a parameter is not valid", errors=errors))


async def _database_away(request: Request, error: Exception) -> Response:
    logger.warning("database unavailable: %s", error)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return problem_response(request, Unavailable("the database does not answer; try again", headers=headers))


def install(app: FastAPI) -> None:
    """What is not listed here is a bug, and answered by the outermost middleware."""
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(RequestValidationError, _invalid_parameter)
    for away in (OperationalError, InterfaceError, PoolExhausted):
        app.add_exception_handler(away, _database_away)
