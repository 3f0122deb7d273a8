"""`agent-service dev` and `demo` as a person runs them, but in a copy of the project: a stack in use is left alone."""

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from app.devstack.ports import LOOPBACK, free_port
from app.devstack.stack import ROOT
from tests.stack import Stack, clean_env

START_SECONDS = 60
STOP_SECONDS = 20


@pytest.fixture
def project(directory: Path) -> Path:
    """A copy of the project."""
    for part in ("app", "worker", "migrations"):
        shutil.copytree(ROOT / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


class Dev:
    """`agent-service dev`, and what it has started."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.port = free_port()
        self._output = project / f"output-{self.port}"
        # Where the tests run in the background, Ctrl-C is ignored, and what they start would ignore it, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app", "dev"],
                cwd=project,
                env=clean_env(API_PORT=str(self.port)),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.started: list[psutil.Process] = []

    def wait_for(self, text: str, *, times: int = 1) -> None:
        Stack.until(lambda: self.output.count(text) >= times or self._process.poll() is not None, seconds=START_SECONDS)
        assert self.output.count(text) >= times, self.output
        self.started = psutil.Process(self._process.pid).children(recursive=True)

    @property
    def output(self) -> str:
        return self._output.read_text()

    def one(self, module: str) -> psutil.Process:
        """What runs this module."""
        [found] = [process for process in self.started if process.cmdline()[1:3] == ["-m", module]]
        return found

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit code; nothing of what it started may be left, and no lock."""
        code = self._process.wait(STOP_SECONDS)
        _, alive = psutil.wait_procs(self.started, timeout=STOP_SECONDS)
        assert alive == []
        assert not (self.project / ".dev" / "lock").exists() or code == -signal.SIGKILL
        return code

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        psutil.wait_procs(self.started, timeout=STOP_SECONDS)


@pytest.fixture
def dev(project: Path) -> Iterator[Dev]:
    dev = Dev(project)
    try:
        dev.wait_for("Ctrl-C stops everything.")
        yield dev
    finally:
        dev.close()


def run(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app", *arguments]
    return subprocess.run(
        command, cwd=project, env=clean_env(**variables), check=False, capture_output=True, text=True, timeout=90
    )


def test_dev_runs_until_ctrl_c_and_restarts_what_is_edited(dev: Dev, project: Path) -> None:
    key_file = project / ".dev" / "key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    second = run(project, "dev", API_PORT=str(free_port()))
    assert second.returncode == 1
    assert re.fullmatch(r"agent-service: a stack is running already in .*/\.dev \(pid \d+\)\n", second.stderr)

    answer = httpx.get(
        f"http://{LOOPBACK}:{dev.port}/v1/agents", headers={"Authorization": f"Bearer {key_file.read_text().strip()}"}
    )
    assert [agent["name"] for agent in answer.json()["data"]] == ["support"]
    listing = subprocess.run(
        ["sh", "-ec", f"set -a; . .dev/env; set +a; {sys.executable} -m app reviews list"],
        cwd=project,
        env=clean_env(),
        check=False,
        capture_output=True,
        text=True,
    )
    assert (listing.returncode, listing.stderr) == (0, "")
    assert listing.stdout.startswith("ID ")

    source = project / "app" / "agents" / "another.py"
    source.write_text("def broken(")
    dev.wait_for("Waiting for the next change.")
    assert "AGENTS: cannot import app.agents: SyntaxError" in dev.output
    source.write_text(
        'from app.domain.agent import Agent\n\nagent = Agent(name="another", instructions="Be another.")\n'
    )
    dev.wait_for("worker started", times=2)
    answer = httpx.get(
        f"http://{LOOPBACK}:{dev.port}/v1/agents", headers={"Authorization": f"Bearer {key_file.read_text().strip()}"}
    )
    assert [agent["name"] for agent in answer.json()["data"]] == ["another", "support"]

    dev.send(signal.SIGINT)
    assert dev.wait() == 0


def test_a_killed_dev_leaves_nothing_behind_and_starts_again_at_once_and_a_part_that_dies_is_named(
    dev: Dev, project: Path
) -> None:
    key = (project / ".dev" / "key").read_text()
    dev.send(signal.SIGKILL)
    again = Dev(project)
    try:
        again.wait_for("Ctrl-C stops everything.")
        assert dev.wait() == -signal.SIGKILL
        assert (project / ".dev" / "key").read_text() == key

        again.one("worker").kill()
        assert again.wait() == 1
        assert "agent-service: worker was killed by SIGKILL; its last output:" in again.output
    finally:
        again.close()


def test_a_port_in_use_is_told_before_anything_is_started(project: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        result = run(project, "dev", API_PORT=str(port))
    assert result.returncode == 1
    assert result.stderr.startswith(f"agent-service: port {port} is in use: ")
    assert result.stdout == ""
    assert list((project / ".dev").iterdir()) == []


def test_the_demo_tells_a_run_step_by_step_and_leaves_nothing_behind(project: Path) -> None:
    result = run(project, "demo")
    assert result.returncode == 0, result.stdout + result.stderr
    for told in (
        "POST /v1/runs: 202",
        "gpt-5-mini asks for ",
        'lookup_order(order_id="A-1001")',
        "search_articles(query=",
        "The run waits for a person",
        "  why       The tool refund asks for approval",
        '  proposal  refund(amount="43.9", reason=',
        "  approve   ",
        "  edit      ",
        "  reject    ",
        "/decision: approve, pinned to what was shown",
        "succeeded · effect once",
        "It cites: ",
        "succeeded (final_answer): ",
        "The stand-in model answered",
    ):
        assert told in result.stdout
    went_on = re.search(r"The run went on (\d+\.\d\d) s after the decision\.", result.stdout)
    assert went_on is not None
    assert float(went_on[1]) <= 2
    assert result.stdout.count("The run waits for a person") == 1
    assert re.findall(r"^ {2}(\d)  ", result.stdout, re.MULTILINE) == [str(seq) for seq in range(6)]
    assert re.search(r"\d+ tokens in \(\d+ cached\), \d+ out · \$0\.\d{6} · \d\.\d\d s", result.stdout)
    assert list((project / ".dev").iterdir()) == []
