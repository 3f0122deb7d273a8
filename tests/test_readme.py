"""What the README and docs/operate.md show, done."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import psycopg
import pytest

from app.devstack.access import is_accepted, make_key
from app.devstack.stack import ROOT
from tests.scripts import DONE, Script, call, rest, steps_of, submit
from tests.stack import Stack

README = (ROOT / "README.md").read_text()
OPERATE = (ROOT / "docs" / "operate.md").read_text()


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


def shell(lines: str, stack: Stack, *, cwd: Path = ROOT, **env: str) -> str:
    """What it prints, on this stack; `agent-service` is this source tree's."""
    lines = lines.replace("http://127.0.0.1:8000", stack.api.address).replace("agent-service ", "$PYTHON -m app ")
    own = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "-ec", lines],
        env={**own, "AGENT_SERVICE_URL": stack.api.address, **env},
        cwd=cwd,
        input="y\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_the_curl_lines_of_the_readme_work(stack: Stack, client: httpx.Client) -> None:
    submitting, *reading = re.findall(r"^curl (?:[^\n]*\\\n)*[^\n]*$", README, re.MULTILINE)
    key = client.headers["Authorization"].removeprefix("Bearer ")

    run_id = re.findall(r'"id":\s*"([^"]+)"', shell(submitting, stack, KEY=key))[0]
    answers = [shell(line, stack, KEY=key, ID=run_id) for line in reading]
    assert len(answers) == 2
    assert '"status":"succeeded"' in answers[0].replace(": ", ":")
    assert "lookup_order" in answers[1]


def test_the_reviewers_commands_work(stack: Stack, client: httpx.Client, tenant: str) -> None:
    [creating] = re.findall(r"`(agent-service keys create [^`]*reviews:decide)`", OPERATE)
    [deciding] = re.findall(r"```sh\n(export AGENT_SERVICE_KEY.*?)```", OPERATE, re.DOTALL)
    key = shell(creating.replace("acme", tenant), stack, DATABASE_URL=stack.database_url).strip()
    run = rest(client, submit(client, "support", "My teapot from order A-1001 arrived broken. I want a refund."))
    assert run["status"] == "waiting"
    [review] = client.get("/v1/reviews", params={"status": "pending"}).json()["data"]
    told = shell(deciding.replace("…", key), stack, REVIEW=review["id"])
    assert told.count(review["id"]) >= 3
    assert rest(client, run)["status"] == "succeeded"


def test_the_keys_commands_work(stack: Stack, database_url: str) -> None:
    [block] = re.findall(r"```sh\n(agent-service keys create.*?)```", OPERATE, re.DOTALL)
    creating, *others = block.splitlines()
    key = shell(creating, stack, DATABASE_URL=database_url).strip()
    told = shell("\n".join(others), stack, DATABASE_URL=database_url, KEY_ID=key.split("_")[1])
    assert "acme" in told
    new_key = re.findall(r"ask_\w+[\w-]+", told)[-1]
    assert is_accepted(database_url, new_key)
    assert not is_accepted(database_url, key)


def test_the_webhook_of_the_documentation_is_created(stack: Stack, client: httpx.Client) -> None:
    [creating] = re.findall(r"```sh\n(curl .*?)```", (ROOT / "docs" / "webhooks.md").read_text(), re.DOTALL)
    key = client.headers["Authorization"].removeprefix("Bearer ")
    assert '"secret":"whsec_' in shell(creating, stack, KEY=key).replace(": ", ":")


def test_the_database_is_prepared_as_is_said(stack: Stack) -> None:
    [migrating] = re.findall(r"^OWNER_DATABASE_URL=.* migrate$", OPERATE, re.MULTILINE)
    [role] = re.findall(r"`(CREATE ROLE service LOGIN PASSWORD '…')`", OPERATE)
    user = f"service_{uuid4().hex[:12]}"
    owner = stack.postgres.create_database(user)
    service = urlsplit(owner)._replace(netloc=f"{user}:x@{urlsplit(owner).netloc.partition('@')[2]}").geturl()
    with psycopg.connect(stack.postgres.url(), autocommit=True) as admin:
        try:
            admin.execute(role.replace("service", user).replace("…", "x"))
            shell(migrating, stack, OWNER=owner, DATABASE_URL=service)
            with psycopg.connect(service) as limited, pytest.raises(psycopg.errors.InsufficientPrivilege):
                limited.execute("DELETE FROM audit_events")
            assert is_accepted(service, make_key(service, tenant="acme", name="web"))
        finally:
            stack.postgres.drop_database(user)
            admin.execute(f"DROP ROLE IF EXISTS {user}")


def test_the_audits_commands_work(stack: Stack, database_url: str, owner_url: str, tmp_path: Path) -> None:
    [block] = re.findall(r"```sh\n(agent-service audit.*?)```", OPERATE, re.DOTALL)
    shell(block, stack, cwd=tmp_path, DATABASE_URL=database_url, OWNER_DATABASE_URL=owner_url)
    assert {file.name for file in tmp_path.iterdir()} == {"signing-key.pem", "public-key.pem", "audit.jsonl.gz"}


COMMAND = r"agent-service ([a-z]+(?: (?:create|list|show|decide|keygen|verify|export|erase|retain|rotate|revoke|set))?)"


@pytest.mark.parametrize("command", sorted(set(re.findall(COMMAND, README + OPERATE))))
def test_the_commands_of_the_readme_exist(command: str) -> None:
    subprocess.run([sys.executable, "-m", "app", *command.split(), "--help"], check=True, capture_output=True)


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "dev", "image", "verify-deploy", "test-containers"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
