"""The image, built once from this tree."""

import subprocess
from collections.abc import Iterator
from uuid import uuid4

import pytest

from app.devstack.stack import ROOT
from tests.containers.engine import docker

BASE = "python:3.13-slim-trixie"
REVISION = "4f90d69c0ffee4f90d69c0ffee4f90d69c0ffee0"
"""What the image is told of where it comes from."""


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """Its name."""
    name = f"agent-service:test-{uuid4().hex[:8]}"
    docker("build", "--quiet", "--build-arg", f"GIT_REVISION={REVISION}", "--tag", name, ".", seconds=900)
    yield name
    subprocess.run(["docker", "rmi", "--force", name], cwd=ROOT, capture_output=True, check=False)


@pytest.fixture(scope="session")
def project_name() -> str:
    """No other run on this engine has it."""
    return f"agent-service-test-{uuid4().hex[:8]}"
