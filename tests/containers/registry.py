"""An image registry on loopback, and signatures: what the drill of a promotion pushes to and verifies with."""

import os
import subprocess
import time
from pathlib import Path

import httpx

from app.devstack.ports import LOOPBACK, free_port
from app.devstack.stack import ROOT
from tests.containers.engine import docker, until


class ToolsMissing(Exception):
    """There are no cosign and docker-registry on this machine, and it cannot get them; the message says why."""


def promotion_tools() -> Path:
    """The folder that holds cosign and docker-registry. Raises `ToolsMissing`."""
    found = subprocess.run([ROOT / ".ci" / "promotion-tools"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise ToolsMissing(found.stderr.strip())
    return Path(found.stdout.strip())


class Registry:
    """A real one, with nothing in it. Docker speaks to it without TLS, because it is on loopback."""

    def __init__(self, directory: Path, tools: Path) -> None:
        self.host = f"{LOOPBACK}:{free_port()}"
        self._tools = tools
        self._pushed: list[str] = []
        config = directory / "registry.yml"
        storage = f"{{filesystem: {{rootdirectory: {directory / 'registry'}}}}}"
        config.write_text(f"version: 0.1\nlog: {{level: warn}}\nstorage: {storage}\nhttp: {{addr: '{self.host}'}}\n")
        with (directory / "registry.log").open("w") as log:
            command = [str(tools / "docker-registry"), "serve", str(config)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers, seconds=20)

    def push(self, image: str, tag: str) -> str:
        """Its reference by digest. The tag is there too."""
        name = f"{self.host}/agent-service:{tag}"
        docker("tag", image, name)
        self._pushed.append(name)
        docker("push", "--quiet", name)
        digests = docker("image", "inspect", "--format", '{{join .RepoDigests "\\n"}}', name).splitlines()
        [reference] = [digest for digest in digests if digest.startswith(f"{self.host}/")]
        self._pushed.append(reference)
        return reference

    def sign(self, reference: str, key: Path) -> None:
        """With no word about it to the public log, which is not for loopback."""
        self._cosign("sign", "--yes", "--tlog-upload=false", "--key", f"{key}.key", reference)

    def new_key(self, at: Path) -> Path:
        """A key pair: `.key` and `.pub`."""
        self._cosign("generate-key-pair", "--output-key-prefix", str(at))
        return at

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        subprocess.run(["docker", "rmi", "--force", *self._pushed], capture_output=True, check=False)

    def _cosign(self, *command: str) -> None:
        env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "COSIGN_PASSWORD": ""}
        subprocess.run([self._tools / "cosign", *command], env=env, check=True, capture_output=True, timeout=60)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"http://{self.host}/v2/").status_code == 200
        except httpx.TransportError:
            time.sleep(0.1)
            return False
