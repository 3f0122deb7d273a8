"""The image, built once from this tree."""

import subprocess
from collections.abc import Iterator
from uuid import uuid4

import pytest

from app.devstack.stack import ROOT

BASE = "python:3.13-slim-trixie"
REVISION = "4f90d69c0ffee4f90d69c0ffee4f90d69c0ffee0"
"""What the image is told of where it comes from."""


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """Its name."""
    name = f"agent-service:test-{uuid4().hex[:8]}"
    command = ["make", "image", f"IMAGE={name}", f"REVISION={REVISION}"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    yield name
    subprocess.run(["docker", "rmi", "--force", name], cwd=ROOT, capture_output=True, check=False)


@pytest.fixture(scope="session")
def project_name() -> str:
    """No other run on this engine has it."""
    return f"agent-service-test-{uuid4().hex[:8]}"
