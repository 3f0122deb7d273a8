"""The OpenAPI document: what the framework cannot know is added here."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from app.api.errors import PROBLEM_JSON
from app.api.examples import EXAMPLES
from app.api.middleware import REQUEST_ID, REQUEST_ID_PATTERN
from app.api.review_schemas import DecideReview
from app.api.schemas import Problem, SubmitRun
from app.api.webhook_schemas import CreateWebhook, WebhookMessage
from app.domain.agent import Agent
from app.domain.webhook import WebhookEvent
from app.registry import Registry

Responses = dict[int | str, dict[str, Any]]

_SCHEMAS = "#/components/schemas/"
_ANY_MAY_ANSWER = {400, 408, 431, 500, 503}
_WHY = {
    400: "Not HTTP/1.1, or something in its head could be read in two ways.",
    401: "The API key is missing, unknown, expired or revoked.",
    403: "The API key does not have the scope; or the agent demands four eyes, and this key has a part in the run.",
    404: "Missing, malformed, or another tenant's: one answer for all.",
    408: "The request took too long to arrive.",
    409: "Not possible as things are, or not any more.",
    413: "The body has more than 1 MiB.",
    415: "The body is not JSON, or it is compressed.",
    422: "Something in the request is not valid; `errors` says where.",
    429: "More than the API key may ask for in a second, or have in flight, or than its tenant may spend in a day.",
    431: "The head is too large, or has too many fields or parameters.",
    500: "A bug; the log has it under the request id.",
    503: "The database does not answer, or is too busy; or there are too many requests at once.",
}
_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    403: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    429: {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
    503: {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
}
_MESSAGE_HEADERS = {
    "webhook-id": "The delivery's id: the same on every attempt.",
    "webhook-timestamp": "When this attempt was made: seconds since 1970.",
    "webhook-signature": "`v1,` and a signature in base64: see the webhook's `secret`.",
}


def problems(*statuses: int) -> Responses:
    """Documents the errors of an operation that needs a key and the database: these, and what all of them have."""
    return {status: _problem(status) for status in sorted({401, 403, 429, *_ANY_MAY_ANSWER, *statuses})}


def problems_without_key(*statuses: int) -> Responses:
    return {status: _problem(status) for status in sorted({*_ANY_MAY_ANSWER, *statuses})}


def _problem(status: int) -> dict[str, Any]:
    return {
        "description": _WHY[status],
        "headers": _HEADERS.get(status, {}),
        "content": {PROBLEM_JSON: {"schema": {"$ref": f"{_SCHEMAS}Problem"}}},
    }


def json_body(model: type[SubmitRun | DecideReview | CreateWebhook]) -> dict[str, Any]:
    """Documents a body that `JsonBody` reads."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"{_SCHEMAS}{model.__name__}"}}},
        }
    }


def describe(app: FastAPI, agents: Registry) -> dict[str, Any]:
    """The document, with what the agents take, the shapes of bodies and problems, examples, and common headers."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        tags=app.openapi_tags,
        routes=app.routes,
    )
    schemas = document["components"]["schemas"]
    schemas.update(_own_schemas(agents))
    for name, example in EXAMPLES.items():  # the framework would drop the nulls in them
        schemas[name]["examples"] = [example]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    document["components"]["headers"] = {
        REQUEST_ID: {
            "description": "Yours where you sent one that fits, else a new one. The log has it.",
            "schema": {"type": "string", "pattern": REQUEST_ID_PATTERN},
        }
    }
    for path in document["paths"].values():
        for operation in path.values():
            _finish(operation["responses"])
    document["webhooks"] = {event.value: {"post": _message(event)} for event in WebhookEvent}
    return document


def _own_schemas(agents: Registry) -> dict[str, Any]:
    """Of bodies, which the framework does not read, and of problems. A submission is described for each agent."""
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (SubmitRun, "validation"),
        (DecideReview, "validation"),
        (CreateWebhook, "validation"),
        (WebhookMessage, "serialization"),
        (Problem, "serialization"),
        *((agent.input, "validation") for agent in agents.values() if agent.input),
    ]
    references, found = models_json_schema(models, ref_template=_SCHEMAS + "{model}")
    schemas: dict[str, Any] = found["$defs"]
    common = schemas["SubmitRun"]
    if agents:
        inputs = {
            agent.name: references[agent.input, "validation"] if agent.input else agent.input_schema
            for agent in agents.values()
        }
        schemas["SubmitRun"] = {
            "title": common["title"],
            "description": common["description"],
            "oneOf": [_submission_to(agents[name], inputs[name], common) for name in sorted(agents)],
        }
    return schemas


def _submission_to(agent: Agent, input_schema: Any, common: dict[str, Any]) -> dict[str, Any]:
    limits = {name: value for name, value in agent.limits.model_dump().items() if value is not None}
    properties = {
        **common["properties"],
        "agent": {"type": "string", "const": agent.name},
        "input": input_schema,
        "limits": {
            "allOf": [{"$ref": f"{_SCHEMAS}LowerLimits"}],
            "properties": {name: {"type": "number", "maximum": float(value)} for name, value in limits.items()},
        },
    }
    return {**common, "title": f"A task for {agent.name}", "description": agent.description, "properties": properties}


def _message(event: WebhookEvent) -> dict[str, Any]:
    """What we post to whoever asked to be told."""
    return {
        "operationId": f"on.{event}",
        "summary": f"A run has become {event.removeprefix('run.')}",
        "tags": ["webhooks"],
        "parameters": [
            {"name": name, "in": "header", "required": True, "description": what, "schema": {"type": "string"}}
            for name, what in _MESSAGE_HEADERS.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"{_SCHEMAS}WebhookMessage"}}},
        },
        "responses": {
            "2XX": {"description": "It is delivered."},
            "410": {"description": "Nothing more is wanted: the webhook is disabled."},
            "default": {"description": "It is sent again later; `Retry-After` says when at the earliest."},
        },
    }


def _finish(responses: dict[str, Any]) -> None:
    # The framework documents its own 422 where there is a path parameter; ours is a 404.
    if "application/json" in responses.get("422", {}).get("content", {}):
        del responses["422"]
    for response in responses.values():
        response.setdefault("headers", {})[REQUEST_ID] = {"$ref": f"#/components/headers/{REQUEST_ID}"}
