"""A machine with both environments, as promote.sh finds it, and customers who do not care what is promoted."""

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import httpx

from app.devstack.ports import LOOPBACK
from app.devstack.stack import ROOT
from tests.containers.engine import docker

Result = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Machine:
    """Where both environments run. `images`: references by digest, by what they are."""

    config: Path
    project: str
    ports: dict[str, int]
    key: Path
    tools: Path
    images: dict[str, str]

    def start(self, image: str, environment: str, **env: str) -> "subprocess.Popen[str]":
        """promote.sh, in a session of its own, as a terminal gives it."""
        env = {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "HOME": os.environ.get("HOME", "/"),
            "CONFIG": str(self.config),
            "PROJECT": self.project,
            "COSIGN_PUBLIC_KEY": f"{self.key}.pub",
            "COSIGN_WITHOUT_LOG": "1",
            **env,
        }
        return subprocess.Popen(
            [ROOT / "deploy" / "compose" / "promote.sh", image, environment],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def promote(self, image: str, environment: str, **env: str) -> Result:
        process = self.start(image, environment, **env)
        said, _ = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, said)

    def address(self, environment: str) -> str:
        return f"http://{LOOPBACK}:{self.ports[environment]}"

    def version(self, environment: str) -> dict[str, Any]:
        return dict(httpx.get(f"{self.address(environment)}/version").json())

    def containers(self, environment: str, service: str = "") -> list[str]:
        """Their ids, of the service or of all."""
        labels = [f"com.docker.compose.project={self.project}-{environment}"]
        labels += [f"com.docker.compose.service={service}"] if service else []
        filters = [part for label in labels for part in ("--filter", f"label={label}")]
        return docker("ps", "--all", "--quiet", *filters).split()

    def client(self, environment: str) -> httpx.Client:
        [api] = self.containers(environment, "api")
        key = docker("exec", api, "agent-service", "keys", "create", "--tenant", "acme", "--name", "drill").strip()
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.address(environment), headers=headers, timeout=10)

    def remove(self) -> None:
        for environment in self.ports:
            for project in (f"{environment}-candidate", environment):
                command = ["docker", "compose", "--project-name", f"{self.project}-{project}", "down", "--volumes"]
                subprocess.run([*command, "--timeout", "5"], capture_output=True, check=False)


class Customers(Thread):
    """Submit a run every 0.2 s, each until it is accepted, and note for how long the API did not answer."""

    def __init__(self, client: httpx.Client) -> None:
        super().__init__()
        self._client = client
        self._leave = Event()
        self.runs: list[str] = []
        self.seconds_away = 0.0

    def run(self) -> None:
        while not self._leave.wait(0.2):
            self.runs.append(self._submit({"Idempotency-Key": uuid4().hex}))

    def _submit(self, once: dict[str, str]) -> str:
        start = time.monotonic()
        while True:
            with suppress(httpx.TransportError):
                answer = self._client.post("/v1/runs", json={"agent": "plain", "input": "Hello"}, headers=once)
                if answer.status_code == 202:
                    self.seconds_away = max(self.seconds_away, time.monotonic() - start)
                    return str(answer.json()["id"])
            time.sleep(0.05)

    def __enter__(self) -> "Customers":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self.join()
