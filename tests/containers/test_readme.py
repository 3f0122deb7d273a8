"""What the README shows of Docker, done as it is written."""

import os
import re
import subprocess
from collections.abc import Iterator

import pytest

from app.devstack.stack import ROOT
from tests.containers.engine import Compose

README = (ROOT / "README.md").read_text()
[STARTING] = re.findall(r"```sh\n(docker compose up --build.*?)```", README, re.DOTALL)
SUBMITTING, POLLING, *_ = re.findall(r"^curl (?:[^\n]*\\\n)*[^\n]*$", README, re.MULTILINE)
[MORE] = re.findall(r"```sh\n(docker compose up --wait --scale.*?)```", README, re.DOTALL)


@pytest.fixture
def compose(image: str, project_name: str) -> Iterator[Compose]:
    project = Compose(f"{project_name}-readme", {"IMAGE": image})
    yield project
    project.down()


def test_two_commands_and_one_curl(compose: Compose, image: str) -> None:
    submitted = "ID=$(" + SUBMITTING + """ | sed -E 's/^\\{"id": ?"([^"]+)".*/\\1/')"""
    lines = "\n".join((STARTING, submitted, POLLING)).replace("http://127.0.0.1:8000", compose.address)
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "COMPOSE_PROJECT_NAME": compose.name}
    ended = subprocess.run(
        ["sh", "-eu", "-c", lines],
        cwd=ROOT,
        env=env | {"API_PORT": str(compose.api_port), "IMAGE": image, "COMPOSE_ENV_FILES": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert '"status":"succeeded"' in ended.stdout.replace(": ", ":")


@pytest.mark.parametrize("line", MORE.splitlines())
def test_there_is_what_the_other_lines_start(compose: Compose, line: str) -> None:
    """Not all images can be had everywhere, so nothing is started."""
    *options, _, wait = line.removeprefix("docker compose ").split(" --scale")[0].split()
    assert wait == "--wait"
    services = compose(*options, "config", "--services").split()
    assert {"api", "worker"} < set(services)
    assert ("grafana" in services) == ("observability" in line)
    assert ("langfuse-web" in services) == ("langfuse" in line)
