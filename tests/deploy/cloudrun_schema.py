"""What Cloud Run's own API accepts, from the discovery documents that Google's client carries."""

import json
import re
from functools import cache
from typing import Any

from tests.deploy.tools import site_packages

_KINDS = {"string": "string", "integer": "integer", "boolean": "boolean", "number": "number", "array": "array"}


@cache
def discovery(name: str) -> dict[str, Any]:
    """The document of one API, such as run.v1."""
    documents = site_packages() / "googleapiclient" / "discovery_cache" / "documents"
    found: dict[str, Any] = json.loads((documents / f"{name}.json").read_text())
    return found


def json_schema(kind: str) -> dict[str, Any]:
    """Of a Service, a Job or a WorkerPool as JSON schema, in which a field that nobody knows is an error."""
    schemas = discovery("run.v1")["schemas"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": f"#/$defs/{kind}",
        "$defs": {name: _converted(schema) for name, schema in schemas.items()},
    }


def _converted(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return {"$ref": f"#/$defs/{schema['$ref']}"}
    if schema.get("type") == "any":
        return {}
    if "properties" not in schema and schema.get("type") != "object":
        converted: dict[str, Any] = {"type": _KINDS[schema["type"]]}
        if "enum" in schema:
            converted["enum"] = schema["enum"]
        if "items" in schema:
            converted["items"] = _converted(schema["items"])
        return converted
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties")
    return {
        "type": "object",
        "properties": {name: _converted(each) for name, each in properties.items()},
        "additionalProperties": _converted(others) if others else False,
    }


def annotations() -> dict[str, set[str]]:
    """Which annotations of Google's there are, and on what each may be: Service, Revision, Job, Execution."""
    text = discovery("run.v1")["schemas"]["ObjectMeta"]["properties"]["annotations"]["description"]
    found = re.findall(r"`([a-z.]+/[\w-]+)`: ([A-Z][A-Za-z, ]*[A-Za-z])", text)
    return {name: set(where.split(", ")) for name, where in found}
