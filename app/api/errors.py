"""Errors as RFC 9457 problem+json. Every type is described in `docs/problems.md`.

RequestError (app.domain.errors)
├── MethodNotAllowed        405
├── BodyTooLarge            413
├── UnsupportedMediaType    415
└── InternalError           500: how a bug looks from outside
"""

import json
import logging
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from app.domain.errors import FieldError, InvalidRequest, NotFound, RequestError, Unavailable
from app.domain.pointer import in_words

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


class BodyTooLarge(RequestError):
    status = 413
    problem = "body-too-large"
    title = "The body is too large"


class UnsupportedMediaType(RequestError):
    status = 415
    problem = "unsupported-media-type"
    title = "The body must be JSON"


class InternalError(RequestError):
    status = 500
    problem = "internal-error"
    title = "Something went wrong here"


def problem_type(error: RequestError | type[RequestError]) -> str:
    """The stable identifier that clients compare."""
    return f"urn:agent-service:problem:{error.problem}"


def problem_response(request: Request, error: RequestError) -> Response:
    problem: dict[str, object] = {
        "type": problem_type(error),
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": quote(request.scope["path"]),
        "request_id": request.state.request_id,
    }
    if error.errors:
        problem["errors"] = [{"pointer": place.pointer, "detail": place.detail} for place in error.errors]
    return Response(json.dumps(problem), status_code=error.status, headers=error.headers, media_type=PROBLEM_JSON)


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
    errors = tuple(FieldError("/".join(map(str, problem["loc"])), in_words(problem)) for problem in problems)
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
