"""Docker's command line, as the tests use it."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from app.devstack.ports import LOOPBACK, free_port
from app.devstack.stack import ROOT

START_SECONDS = 180.0
"""For all containers of a project to be healthy, on a machine that does other things as well."""


def docker(*command: str, seconds: float = 600) -> str:
    """What it prints. Raises `AssertionError` with all that it said where it fails."""
    ended = subprocess.run(["docker", *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    assert ended.returncode == 0, f"docker {' '.join(command)}: {ended.stdout}\n{ended.stderr}"
    return ended.stdout


def inspect(name: str) -> dict[str, Any]:
    """Of a container or an image."""
    [found] = json.loads(docker("inspect", name))
    return dict(found)


def until(condition: Callable[[], object], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.1)


class Compose:
    """One project of docker-compose.yml, with nothing of this machine's environment or `.env` in it.

    `files`: overlays, from the root of the project. `env`: what is interpolated.
    """

    def __init__(self, name: str, env: Mapping[str, str], *, files: Sequence[str] = ()) -> None:
        self.name = name
        self.api_port = free_port()
        self._files = ["docker-compose.yml", *files]
        self._env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "API_PORT": str(self.api_port)}
        self._env |= env

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.api_port}"

    def run(self, *command: str, check: bool = True, seconds: float = 600) -> "subprocess.CompletedProcess[str]":
        """`docker compose …`."""
        files = [part for file in self._files for part in ("--file", file)]
        ended = subprocess.run(
            ["docker", "compose", "--project-name", self.name, "--env-file", os.devnull, *files, *command],
            cwd=ROOT,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if check and ended.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {ended.stdout}\n{ended.stderr}\n{self.logs()}")
        return ended

    def __call__(self, *command: str, seconds: float = 600) -> str:
        """What it prints."""
        return self.run(*command, seconds=seconds).stdout

    def up(self, *command: str) -> None:
        """Until all that is started is healthy."""
        self("up", "--detach", "--no-build", "--wait", "--wait-timeout", f"{START_SECONDS:.0f}", *command)

    def down(self) -> None:
        """Containers, networks and volumes."""
        self("--profile", "*", "down", "--volumes", "--timeout", "5")

    def logs(self) -> str:
        return self.run("logs", "--no-color", "--tail", "40", check=False).stdout

    def containers(self, service: str) -> list[str]:
        """Their ids; also of those that have ended."""
        return self("ps", "--all", "--quiet", service).split()

    def states(self) -> list[dict[str, Any]]:
        """What `ps` says of each container."""
        return [json.loads(line) for line in self("ps", "--all", "--format", "json").splitlines()]

    def sql(self, statement: str) -> list[list[str]]:
        """Rows, as text."""
        psql = (
            "psql",
            "--username=postgres",
            "--dbname=agent_service",
            "--csv",
            "--tuples-only",
            "--command",
            statement,
        )
        return [line.split(",") for line in self("exec", "--no-TTY", "postgres", *psql).splitlines()]

    def client(self) -> httpx.Client:
        """With a key of a tenant."""
        key = self("exec", "--no-TTY", "api", "agent-service", "keys", "create", "--tenant", "acme", "--name", "test")
        return httpx.Client(base_url=self.address, headers={"Authorization": f"Bearer {key.strip()}"}, timeout=40)
