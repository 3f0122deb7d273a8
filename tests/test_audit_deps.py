"""`make audit-deps` against a server that speaks OSV's protocol, and against none."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.devstack.ports import LOOPBACK, free_port
from app.devstack.stack import ROOT

VULNERABLE = "leftpad"


class Osv(BaseHTTPRequestHandler):
    """Knows of one package that something is wrong with."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        vulns = [{"id": "PYSEC-2026-1", "modified": "2026-01-01T00:00:00Z"}]
        known = [{"vulns": vulns} if query["package"]["name"] == VULNERABLE else {} for query in asked]
        self._answer({"results": known})

    def do_GET(self) -> None:
        package = {"name": VULNERABLE, "ecosystem": "PyPI"}
        ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.3"}]}]
        self._answer(
            {
                "id": "PYSEC-2026-1",
                "modified": "2026-01-01T00:00:00Z",
                "summary": "It pads too far",
                "affected": [{"package": package, "ranges": ranges}],
            }
        )

    def _answer(self, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def service() -> Iterator[str]:
    with HTTPServer((LOOPBACK, 0), Osv) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://{LOOPBACK}:{server.server_port}"
        server.shutdown()
        thread.join()


def audit(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ".ci/audit_deps.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_nothing_known_is_good(service: str) -> None:
    ended = audit("--service-url", service)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Nothing is known against the" in ended.stdout


def test_what_is_known_is_listed_and_fails(service: str, tmp_path: Path) -> None:
    lock = tmp_path / "some.lock"
    lock.write_text(f"rightpad==2.0 \\\n    --hash=sha256:00\n{VULNERABLE}==1.2 ; sys_platform != 'win32' \\\n")
    ended = audit("--service-url", service, "--lock", str(lock))
    assert ended.returncode == 1
    assert f"{VULNERABLE} 1.2" in ended.stdout
    assert "It pads too far" in ended.stdout
    assert "1.3" in ended.stdout
    assert "rightpad" not in ended.stdout


def test_offline_it_says_so_in_a_line_and_is_content() -> None:
    ended = audit("--service-url", f"http://{LOOPBACK}:{free_port()}")
    assert (ended.returncode, ended.stdout) == (0, "")
    [line] = ended.stderr.splitlines()
    assert line.startswith("audit-deps: known vulnerabilities could not be looked up")


def test_a_lock_that_pins_nothing_is_a_mistake(service: str, tmp_path: Path) -> None:
    lock = tmp_path / "empty.lock"
    lock.write_text("# nothing\n")
    assert audit("--service-url", service, "--lock", str(lock)).returncode == 1


def test_every_pin_of_the_lock_is_looked_at(service: str) -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pins = [line for line in lock.splitlines() if "==" in line and not line.startswith((" ", "#"))]
    assert len(pins) > 20
    assert f"the {len(pins)} packages of requirements.lock" in audit("--service-url", service).stdout
