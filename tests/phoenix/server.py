"""Phoenix as a child process, and what it knows of a trace."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from app.devstack.ports import LOOPBACK
from app.devstack.processes import ProcessFailed, Reaper, Server
from app.devstack.stack import ROOT
from tests.phoenix import serve

PYTHON = ROOT / ".venv-phoenix/bin/python"

_SPANS = """
query ($trace: String!) {
  trace: getTraceByOtelId(traceId: $trace) {
    project { name }
    userId
    session { sessionId }
    costSummary { total { tokens cost } }
    rootSpan { spanId propagatedStatusCode cumulativeTokenCountPrompt cumulativeTokenCountCompletion }
    spans(first: 1000) {
      edges {
        node {
          spanId parentId name spanKind startTime endTime statusCode statusMessage attributes
          input { value mimeType } output { value mimeType }
          tokenCountPrompt tokenCountCompletion tokenPromptDetails { cacheRead } costSummary { total { cost } }
        }
      }
    }
  }
}
"""


@dataclass(frozen=True)
class Span:
    """As Phoenix shows it. `seen`: its whole answer; `said`: the attributes by their full names."""

    seen: dict[str, Any]
    said: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.seen["spanId"])

    @property
    def parent(self) -> str | None:
        found: str | None = self.seen["parentId"]
        return found

    @property
    def name(self) -> str:
        return str(self.seen["name"])

    @property
    def has_failed(self) -> bool:
        return bool(self.seen["statusCode"] == "ERROR")

    @property
    def begins(self) -> datetime:
        return datetime.fromisoformat(self.seen["startTime"])

    @property
    def ends(self) -> datetime:
        return datetime.fromisoformat(self.seen["endTime"])

    @property
    def ms(self) -> float:
        return (self.ends - self.begins).total_seconds() * 1000


@dataclass(frozen=True)
class Trace:
    """`spans`: by when they began, the longest first. `seen`: what Phoenix says of the trace as a whole."""

    spans: list[Span]
    seen: dict[str, Any]

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.spans]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def of_kind(self, kind: str) -> list[Span]:
        return [span for span in self.spans if span.seen["spanKind"] == kind]


class Phoenix(Server):
    """A Phoenix without data, on SQLite. `directory`: its own."""

    ready_seconds = 120.0  # it is a large program, and slow where Python has not compiled it yet

    def __init__(self, directory: Path, *, reaper: Reaper) -> None:
        directory.mkdir()
        super().__init__("phoenix", directory=directory, log=directory / "log", reaper=reaper)
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "PHOENIX_HOST": LOOPBACK,
            "PHOENIX_PORT": str(self.port),
            "PHOENIX_WORKING_DIR": str(directory),
            "PHOENIX_TELEMETRY_ENABLED": "false",
            "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
            "PHOENIX_DISABLE_AGENT_ASSISTANT": "true",
            "PHOENIX_ENABLE_MCP_SERVER": "false",
        }
        # Without the certificates that nobody needs here, and not by way of a proxy.
        self._client = httpx.Client(base_url=self.address, verify=False, trust_env=False)

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def command(self) -> list[str]:
        return [str(PYTHON), "-P", serve.__file__]

    def _prepare(self) -> None:
        if not PYTHON.exists():
            raise ProcessFailed("Phoenix is not installed: make test-phoenix")

    def _is_ready(self) -> bool:
        try:
            return self._client.get("/healthz").is_success
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Stop it, for good."""
        self.stop()
        self._client.close()

    def get(self, address: str) -> httpx.Response:
        """A page of it."""
        return self._client.get(address)

    def trace(self, trace_id: str) -> Trace | None:
        """What it knows of a trace so far."""
        answer = self._client.post("/graphql", json={"query": _SPANS, "variables": {"trace": trace_id}}).json()
        assert "errors" not in answer, answer
        seen = answer["data"]["trace"]
        if seen is None:
            return None
        found = [edge["node"] for edge in seen.pop("spans")["edges"]]
        spans = [Span(node, dict(_flat(json.loads(node["attributes"])))) for node in found]
        return Trace(sorted(spans, key=lambda span: (span.begins, -span.ms)), seen)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Phoenix keeps `a.b` as an object in an object."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value
