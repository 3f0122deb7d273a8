"""What the README shows, done."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.devstack.access import make_key
from app.devstack.stack import ROOT
from tests.scripts import DONE, Script, call, rest, steps_of, submit
from tests.stack import Stack

README = (ROOT / "README.md").read_text()


@pytest.fixture
def weather(stack: Stack, directory: Path) -> Iterator[httpx.Client]:
    """An API and a worker that serve the README's agent, out of a package that holds nothing else."""
    [snippet] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    package = directory / "readme_agents"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "weather.py").write_text(snippet)
    env = {"AGENTS": "readme_agents", "PYTHONPATH": str(directory)}
    database = stack.postgres.create_database("readme", template="migrated")
    own = {"DATABASE_URL": database, "REDIS_URL": stack.valkey.url(5)}
    worker = stack.another_worker("readme-worker", **env, **own)
    api = stack.another_api("readme-api", **env, **own)
    try:
        worker.start()
        api.start()
        with httpx.Client(base_url=api.address, timeout=30) as client:
            client.headers["Authorization"] = f"Bearer {make_key(database, tenant='acme', name='readme')}"
            yield client
    finally:
        api.stop()
        worker.stop()


def test_the_agent_of_the_readme_works(stack: Stack, weather: httpx.Client) -> None:
    client = weather
    [agent] = client.get("/v1/agents").json()["data"]
    assert agent["name"] == "weather"
    script = Script(stack.model_url, [call("forecast", {"city": "Bern", "days": 2}), DONE])
    run = rest(client, submit(client, "weather", script.input))
    assert run["status"] == "succeeded"
    assert steps_of(client, run)[1]["result"] == '{"city":"Bern","forecast":"sunny for 2 days","asked_by":"acme"}'
    [tool] = script.requests()[0]["tools"]
    assert tool["function"]["parameters"]["properties"]["days"]["description"] == "How many days, at most a week."


def test_the_curl_lines_of_the_readme_work(stack: Stack, client: httpx.Client) -> None:
    submitting, *reading = re.findall(r"^curl (?:[^\n]*\\\n)*[^\n]*$", README, re.MULTILINE)
    key = client.headers["Authorization"].removeprefix("Bearer ")

    def shell(line: str, **env: str) -> str:
        line = line.replace("http://127.0.0.1:8000", stack.api.address)
        result = subprocess.run(
            ["sh", "-c", line],
            env={"KEY": key, "PATH": "/usr/bin:/bin", **env},
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout

    run_id = re.findall(r'"id":\s*"([^"]+)"', shell(submitting))[0]
    answers = [shell(line, ID=run_id) for line in reading]
    assert len(answers) == 2
    assert '"status":"succeeded"' in answers[0].replace(": ", ":")
    assert "lookup_order" in answers[1]


@pytest.mark.parametrize("command", sorted(set(re.findall(r"agent-service ([a-z]+(?: create)?)", README))))
def test_the_commands_of_the_readme_exist(command: str) -> None:
    subprocess.run([sys.executable, "-m", "app", *command.split(), "--help"], check=True, capture_output=True)


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z]+)", README)) - {"a"}
    assert {"demo", "test", "dev"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
