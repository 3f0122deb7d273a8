"""What every deployment target comes to, whatever format it is written in."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import ROOT

DEPLOY = ROOT / "deploy"
NO_DIGEST = "sha256:" + "0" * 64
"""What manifests name until a script puts the digest of a real image in its place."""
IMAGE = f"registry.example.com/agent-service@{NO_DIGEST}"


@dataclass(frozen=True)
class Probe:
    path: str
    port: int


@dataclass(frozen=True)
class Workload:
    """One role at one target."""

    target: str
    role: str
    image: str
    entry_point: tuple[str, ...] = ()
    """Instead of the image's own; empty: the image's own."""
    arguments: tuple[str, ...] = ()
    plain: Mapping[str, str] = field(default_factory=dict)
    secret: Mapping[str, str] = field(default_factory=dict)
    """By variable, where its value is kept."""
    grace: float | None = None
    """Seconds from SIGTERM to SIGKILL; None: it is not stopped that way."""
    probes: tuple[Probe, ...] = ()
    ports: tuple[int, ...] = ()
    user: str | None = None
    """Of whom it is said here; None: the image's own."""
    read_only: bool | None = None
    """Is the root file system? None: the platform has no such setting."""
    has_health_command: bool = False
    """Is the image's `healthcheck` run in the container?"""


@dataclass(frozen=True)
class Scaler:
    """What sets the number of workers at one target."""

    target: str
    text: str
    """All of its manifest, as JSON."""
    url: str
    value: str
    per_worker: str
    minimum: int | None
    maximum: int | None
    """None: it has no bounds of its own, and takes the number as it is."""


@dataclass(frozen=True)
class Target:
    name: str
    workloads: tuple[Workload, ...]
    scaler: Scaler | None


def documents(*paths: Path) -> list[dict[str, Any]]:
    """Every YAML document of these files."""
    found: list[dict[str, Any]] = []
    for path in paths:
        found += [each for each in yaml.safe_load_all(path.read_text()) if isinstance(each, dict)]
    return found


def walk(part: object) -> Iterator[dict[str, Any]]:
    """Every mapping in a document, from the outside in."""
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from walk(value)
    elif isinstance(part, list):
        for value in part:
            yield from walk(value)


def metrics_api(target: str, manifest: Mapping[str, Any], minimum: int, maximum: int) -> Scaler:
    """A KEDA trigger, in whichever words a platform puts it."""
    metadata = next(each for each in walk(manifest) if "valueLocation" in each)
    return Scaler(
        target=target,
        text=json.dumps(manifest),
        url=metadata["url"],
        value=metadata["valueLocation"],
        per_worker=str(metadata["targetValue"]),
        minimum=minimum,
        maximum=maximum,
    )
