"""What each kind of tracing back end demands of a request, after its own documentation."""

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from tests.otlp.spans import Request

Kind = Literal["langfuse", "phoenix", "langsmith", "datadog", "collector"]
KINDS: tuple[Kind, ...] = ("langfuse", "phoenix", "langsmith", "datadog")
"""The four that have settings of their own."""


@dataclass(frozen=True)
class Front:
    """What one kind of back end demands. `settings`: of the service; `headers`: on requests with spans."""

    traces_path: str
    settings: Mapping[str, str]
    headers: Mapping[str, str]
    scores_path: str | None = None


def _langfuse(address: str) -> Front:
    public_key, secret_key = f"pk-lf-{uuid4()}", f"sk-lf-{uuid4()}"
    basic = base64.b64encode(f"{public_key}:{secret_key}".encode()).decode()
    return Front(
        "/api/public/otel/v1/traces",
        {"LANGFUSE_HOST": address, "LANGFUSE_PUBLIC_KEY": public_key, "LANGFUSE_SECRET_KEY": secret_key},
        {
            "authorization": f"Basic {basic}",
            "x-langfuse-ingestion-version": "4",
            "x-langfuse-sdk-name": "python",
            "x-langfuse-public-key": public_key,
        },
        scores_path="/api/public/scores",
    )


def _phoenix(address: str) -> Front:
    key = f"phoenix-{uuid4().hex}"
    return Front(
        "/v1/traces",
        {"PHOENIX_COLLECTOR_ENDPOINT": address, "PHOENIX_API_KEY": key},
        {"authorization": f"Bearer {key}"},
    )


def _langsmith(address: str) -> Front:
    key = f"lsv2_pt_{uuid4().hex}"
    return Front(
        "/otel/v1/traces",
        {"LANGSMITH_ENDPOINT": address, "LANGSMITH_API_KEY": key, "LANGSMITH_PROJECT": "tests of agents"},
        {"x-api-key": key, "langsmith-project": "tests of agents"},
    )


def _datadog(address: str) -> Front:
    key = uuid4().hex
    return Front(
        "/v1/traces",
        {"DD_OTLP_ENDPOINT": f"{address}/v1/traces", "DD_API_KEY": key},
        {"dd-api-key": key, "dd-otlp-source": "llmobs"},
    )


def _collector(address: str) -> Front:
    token = f"token-{uuid4().hex}"
    return Front(
        "/v1/traces",
        {"OTLP_ENDPOINTS": f"{address}/v1/traces authorization=Bearer%20{token} x-scope-orgid=tests"},
        {"authorization": f"Bearer {token}", "x-scope-orgid": "tests"},
    )


FRONTS: dict[Kind, Callable[[str], Front]] = {
    "langfuse": _langfuse,
    "phoenix": _phoenix,
    "langsmith": _langsmith,
    "datadog": _datadog,
    "collector": _collector,
}


def wrong_with_spans(request: Request) -> list[str]:
    wrong = []
    if request.headers.get("content-type") != "application/x-protobuf":
        wrong.append(f"content-type: {request.headers.get('content-type')!r}")
    if request.headers.get("content-encoding") != "gzip":
        wrong.append("not compressed by gzip")
    return wrong


def wrong_with_scores(request: Request) -> list[str]:
    try:
        scores = json.loads(request.plain)
    except ValueError:
        return ["the scores are no JSON"]
    if not isinstance(scores, list) or not scores:
        return [f"the scores are no list: {request.plain[:200]!r}"]
    return [message for score in scores if (message := _wrong_with_score(score))]


def _wrong_with_score(score: Mapping[str, Any]) -> str | None:
    kinds: dict[object, type | tuple[type, ...]] = {
        "NUMERIC": (int, float),
        "BOOLEAN": (int, float),
        "CATEGORICAL": str,
    }
    its = kinds.get(score.get("dataType"))
    fits = its is not None and isinstance(score.get("value"), its) and not isinstance(score.get("value"), bool)
    if score.get("dataType") == "BOOLEAN":
        fits = fits and score.get("value") in (0, 1)
    has_ids = re.fullmatch(r"[0-9a-f]{32}", str(score.get("traceId"))) and score.get("id") and score.get("name")
    return None if fits and has_ids else f"no score: {score}"
