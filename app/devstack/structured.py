"""Structured output: an answer put into the form that a request's `response_format` demands."""

import json
from dataclasses import dataclass
from typing import Any

from app.devstack.wire import ResponseFormat


def in_format(wanted: ResponseFormat | None, answer: str, citations: list[str]) -> str:
    """The answer as text, or as JSON where that is demanded."""
    if wanted is None or wanted.type == "text":
        return answer
    if wanted.type == "json_object" or wanted.json_schema is None:
        return json.dumps({"answer": answer, "citations": citations}, ensure_ascii=False)
    schema = wanted.json_schema.json_schema
    return json.dumps(_Form(answer, citations, schema.get("$defs", {})).fill(schema), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class _Form:
    """Fills JSON schemas as simply as they allow: the answer wherever there is text, citations under their name.

    Formats and patterns are not looked at: the caller validates the answer, and says so when it does not fit.
    """

    answer: str
    citations: list[str]
    definitions: dict[str, Any]

    def fill(self, schema: dict[str, Any]) -> Any:
        value: Any = None
        match self._resolve(schema):
            case {"enum": [first, *_]} | {"const": first}:
                value = first
            case {"type": "object", **rest}:
                value = {name: self._fill_property(name, form) for name, form in rest.get("properties", {}).items()}
            case {"type": "array", **rest}:
                value = [self.fill(rest["items"]) for _ in range(rest.get("minItems", 0))]
            case {"type": "string", **rest}:
                value = self.answer[: rest.get("maxLength")]
            case {"type": "integer" | "number", **rest}:
                value = rest.get("minimum", rest.get("exclusiveMinimum", -1) + 1)
            case {"type": "boolean"}:
                value = False
        return value

    def _fill_property(self, name: str, schema: dict[str, Any]) -> Any:
        return self.citations if name == "citations" else self.fill(schema)

    def _resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Follow references, and take the first of several forms."""
        while True:
            if "$ref" in schema:
                schema = self.definitions[schema["$ref"].rpartition("/")[2]]
            elif options := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
                schema = options[0]
            else:
                return schema
