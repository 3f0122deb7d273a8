"""The OpenAPI document says what the API does, and the problems it lists are those that exist."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import app.main  # noqa: F401 - brings in every error
from app.api import review_schemas, schemas, webhook_schemas
from app.api.errors import PROBLEM_JSON
from app.api.examples import EXAMPLES
from app.domain.errors import RequestError
from tests.stack import Stack

Json = dict[str, Any]
PROBLEMS = Path(__file__).resolve().parents[2] / "docs" / "problems.md"


@pytest.fixture
def document(stack: Stack) -> Json:
    found: Json = httpx.get(f"{stack.api.address}/openapi.json", trust_env=False).json()
    return found


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_operation_is_described(document: Json) -> None:
    found = list(operations(document))
    assert {(method, path) for method, path, _ in found} == {
        ("post", "/v1/runs"),
        ("get", "/v1/runs"),
        ("get", "/v1/runs/{run_id}"),
        ("get", "/v1/runs/{run_id}/steps"),
        ("get", "/v1/runs/{run_id}/audit"),
        ("post", "/v1/runs/{run_id}/cancel"),
        ("get", "/v1/agents"),
        ("get", "/v1/scaling"),
        ("get", "/v1/reviews"),
        ("get", "/v1/reviews/{review_id}"),
        ("post", "/v1/reviews/{review_id}/decision"),
        ("post", "/v1/webhooks"),
        ("get", "/v1/webhooks"),
        ("get", "/v1/webhooks/{webhook_id}"),
        ("delete", "/v1/webhooks/{webhook_id}"),
        ("get", "/v1/webhooks/{webhook_id}/deliveries"),
        ("post", "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver"),
        ("get", "/v1/runs/{run_id}/deliveries"),
        ("get", "/health"),
        ("get", "/health/live"),
        ("get", "/health/ready"),
        ("get", "/version"),
        ("get", "/metrics"),
    }
    ids = [operation["operationId"] for _, _, operation in found]
    assert len(set(ids)) == len(ids)
    described = {tag["name"] for tag in document["tags"]}
    for method, path, operation in found:
        assert operation["summary"], (method, path)
        assert set(operation["tags"]) <= described


def test_every_operation_on_data_names_the_scope_it_needs(document: Json) -> None:
    assert document["components"]["securitySchemes"]["apiKey"]["scheme"] == "bearer"
    for _, path, operation in operations(document):
        if path.startswith("/v1/"):
            (needed,) = operation["security"]
            assert len(needed["apiKey"]) == 1, path
            assert {"401", "403", "500", "503"} <= set(operation["responses"]), path
        else:
            assert "security" not in operation


def test_every_error_is_a_problem(document: Json) -> None:
    for method, path, operation in operations(document):
        for status, response in operation["responses"].items():
            assert response["description"]
            assert "X-Request-Id" in response["headers"]
            if int(status) >= 400:
                schema = response["content"][PROBLEM_JSON]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (method, path, status)
                assert list(response["content"]) == [PROBLEM_JSON]
            elif int(status) != 204:
                ((media_type, content),) = response["content"].items()
                assert media_type == ("text/plain" if path == "/metrics" else "application/json")
                assert content["schema"]


def test_every_reference_leads_somewhere(document: Json) -> None:
    for reference in set(references(document)):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_every_shape_has_an_example_that_fits_it(document: Json) -> None:
    shapes = document["components"]["schemas"]
    for name in EXAMPLES:
        (example,) = shapes[name]["examples"]
        [model] = {vars(module)[name] for module in (schemas, review_schemas, webhook_schemas) if name in vars(module)}
        fitting = model.model_validate_json(json.dumps(example)).model_dump(mode="json", exclude_unset=True)
        assert set(example) == set(fitting), name
        assert set(shapes[name].get("required", [])) <= set(example), name


def test_what_webhooks_are_told_is_described(document: Json) -> None:
    for event, methods in document["webhooks"].items():
        schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/WebhookMessage"}, event
    assert set(document["webhooks"]) == set(document["components"]["schemas"]["WebhookEvent"]["enum"])


def test_the_example_of_a_submission_is_accepted(client: httpx.Client) -> None:
    response = client.post("/v1/runs", json=EXAMPLES["SubmitRun"])
    assert response.status_code == 202
    assert set(response.json()) == set(EXAMPLES["Run"])


def test_the_document_knows_what_each_agent_takes(document: Json) -> None:
    variants = document["components"]["schemas"]["SubmitRun"]["oneOf"]
    takes = {variant["properties"]["agent"]["const"]: variant["properties"] for variant in variants}
    assert takes["support"]["input"]["type"] == "string"
    assert takes["support"]["limits"]["properties"]["max_steps"]["maximum"] == 10
    question = takes["typed"]["input"]["$ref"].removeprefix("#/components/schemas/")
    assert document["components"]["schemas"][question]["required"] == ["subject"]
    assert "max_cost_usd" not in takes["free"]["limits"]["properties"]


def test_the_limits_of_a_request_have_no_defaults_of_their_own(document: Json) -> None:
    limits = document["components"]["schemas"]["LowerLimits"]
    assert "required" not in limits
    assert all("default" not in limit for limit in limits["properties"].values())


def every_kind(kind: type[RequestError]) -> Iterator[type[RequestError]]:
    for below in kind.__subclasses__():
        yield below
        yield from every_kind(below)


def test_every_problem_type_is_documented_and_every_documented_one_exists() -> None:
    documented = set(re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", PROBLEMS.read_text(), flags=re.MULTILINE))
    assert documented == {(kind.problem, str(kind.status)) for kind in every_kind(RequestError)}
