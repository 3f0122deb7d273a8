"""A stand-in of Google Cloud for the scripts of deploy/cloudrun: programs named gcloud and cosign that record how they
are called, and keep what they are told to run; and Cloud Monitoring over HTTP.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.deploy import cloudrun_programs
from tests.deploy.cloudrun_programs import SHARES, TOKEN, share

PYTHON = f'"{sys.executable}" -S -X frozen_modules=on'
"""Each call is a process, and there are many: without site-packages they start faster."""


class Google:
    """The tests' side. `directory`: what the programs share; `url`: where the service and its candidate answer."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.url = url
        self.bin = directory / "bin"
        self.bin.mkdir()
        (directory / "url").write_text(url)
        for name in ("gcloud", "cosign"):
            program = self.bin / name
            program.write_text(f'#!/bin/sh\nexec {PYTHON} "{cloudrun_programs.__file__}" {name} "$@"\n')
            program.chmod(0o755)
        # Not whatever python3 is found first, which may take its time to find out.
        (self.bin / "python3").write_text(f'#!/bin/sh\nexec {PYTHON} "$@"\n')
        (self.bin / "python3").chmod(0o755)
        self.queries: list[dict[str, list[str]]] = []
        self.answers: dict[int, dict[str, int]] = {}
        """By the share of traffic that the candidate has: requests by class, such as 5xx."""

    @property
    def calls(self) -> list[list[str]]:
        """All of them, in order."""
        file = self.directory / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def called(self, *words: str) -> list[list[str]]:
        """The calls that hold all of these words."""
        return [call for call in self.calls if all(word in call for word in words)]

    def serves(self, api: str, worker: str) -> None:
        """From now on, these revisions are what runs."""
        for kind, name in (("services", api), ("worker-pools", worker)):
            resource = {
                "metadata": {
                    "name": name.removesuffix("-before"),
                    "annotations": {"run.googleapis.com/manualInstanceCount": "1"},
                },
                "status": {SHARES[kind]: [{"revisionName": name, "percent": 100}], "url": self.url},
            }
            (self.directory / f"{kind}.json").write_text(json.dumps(resource))

    def fails(self, text: str) -> None:
        """From now on, calls that hold this fail."""
        (self.directory / "fails").write_text(text)

    def waits(self, text: str) -> None:
        """From now on, calls that hold this take a second."""
        (self.directory / "waits").write_text(text)

    def runs(self, kind: str) -> dict[str, Any] | None:
        file = self.directory / f"{kind}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def shares(self, kind: str) -> dict[str, int]:
        """By revision, in percent."""
        resource = self.runs(kind)
        assert resource is not None
        shares = resource["status"][SHARES[kind]]
        return {each["revisionName"]: each["percent"] for each in shares if each.get("percent")}

    def set_shares(self, kind: str, shares: Mapping[str, int]) -> None:
        resource = self.runs(kind)
        assert resource is not None
        share(resource, kind, shares)
        (self.directory / f"{kind}.json").write_text(json.dumps(resource))

    @property
    def manifests(self) -> list[Path]:
        """All that was handed over, in order."""
        return sorted(self.directory.glob("manifest-*.yaml"))

    @contextmanager
    def monitoring(self) -> Iterator[str]:
        """Where Cloud Monitoring answers."""
        google = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                google.queries.append(parse_qs(urlsplit(self.path).query))
                assert self.headers["Authorization"] == f"Bearer {TOKEN}"
                body = json.dumps({"timeSeries": google.series()}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Not into the tests' output."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join()

    def series(self) -> list[dict[str, Any]]:
        service = self.runs("services")
        assert service is not None
        candidate = service["spec"]["template"]["metadata"]["name"]
        counted = self.answers.get(self.shares("services").get(candidate, 0), {"2xx": 100})
        return [
            {
                "metric": {"type": "run.googleapis.com/request_count", "labels": {"response_code_class": name}},
                "points": [{"value": {"int64Value": str(number)}}],
            }
            for name, number in counted.items()
        ]


def real_gcloud(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """The real one, without credentials: it exits with 2 for what it does not understand, else with 1."""
    env = {**os.environ, "CLOUDSDK_CONFIG": str(directory), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    return subprocess.run(["gcloud", *arguments], env=env, capture_output=True, text=True, check=False)
