"""The drill of a promotion, with promote.sh itself: to staging, to production, and back where an image does not pass.

Both environments are on this engine, from an image registry on loopback. Each test goes on with what the one before has
left.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from app.devstack.ports import free_port
from app.devstack.stack import ROOT
from tests.containers.engine import docker, inspect, until
from tests.containers.machine import Customers, Machine
from tests.containers.registry import Registry, ToolsMissing, promotion_tools
from tests.stack import new_directory

GOOD = """
from app.agents.support import agent as support
from app.domain.agent import Agent

plain = Agent(name="plain", instructions="Answer.")
"""
BROKEN = """
import os
from dataclasses import replace

from app.agents import support as as_it_was
from app.domain.agent import Agent

plain = Agent(name="plain", instructions="Answer.")


def forgotten(_):
    # Only what replaces the service has its audit's own volume; the candidate's worker has not.
    if os.environ["BROKEN"] == "always" or os.environ["AUDIT_ANCHOR"].startswith("/"):
        raise RuntimeError("forgotten")
    return as_it_was.INSTRUCTIONS


support = replace(as_it_was.agent, instructions=forgotten)
"""
OF_THIS_MACHINE = """
services:
  api: {{healthcheck: {{interval: 3s, start_period: 90s}}}}
  worker: {{healthcheck: {{interval: 3s, start_period: 90s}}, networks: [provider]}}
networks:
  provider: {{external: true, name: {provider}}}
"""
"""What a machine adds: here, a way to the model, and that it is seen sooner that a container is healthy."""
SECONDS_AWAY = 10.0
"""While its container is replaced the API does not answer. It takes 3 s, on a machine that does nothing else."""


def build(image: str, directory: Path, name: str, agents: str, *, broken: str = "") -> str:
    """Ours with these agents. Its name."""
    context = directory / name
    (context / "drill").mkdir(parents=True)
    (context / "drill" / "__init__.py").write_text(agents)
    (context / "Dockerfile").write_text(
        f"FROM {image}\nLABEL drill={name}\nCOPY drill /drill/drill\nENV PYTHONPATH=/drill BROKEN={broken}\n"
    )
    docker("build", "--quiet", "--tag", f"{image}-{name}", str(context))
    return f"{image}-{name}"


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with new_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def tools() -> Path:
    try:
        return promotion_tools()
    except ToolsMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def registry(directory: Path, tools: Path) -> Iterator[Registry]:
    registry = Registry(directory, tools)
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def provider(image: str) -> Iterator[str]:
    """Whom the workers ask for a model: the stand-in, outside of both environments. Its name, and its network's."""
    name = f"provider-{uuid4().hex[:8]}"
    docker("network", "create", name)
    module = ["-m", "app.devstack.model_server", "--host", "0.0.0.0", "--port", "8080"]
    docker("run", "--detach", "--rm", "--name", name, "--network", name, "--entrypoint", "python", image, *module)
    yield name
    docker("rm", "--force", name)
    docker("network", "rm", name)


@pytest.fixture(scope="module")
def images(image: str, directory: Path, registry: Registry) -> Iterator[dict[str, str]]:
    built = {
        "first": build(image, directory, "first", GOOD),
        "broken": build(image, directory, "broken", BROKEN, broken="always"),
        "treacherous": build(image, directory, "treacherous", BROKEN, broken="in-place"),
    }
    yield {name: registry.push(local, name) for name, local in {"unsigned": image, **built}.items()}
    docker("rmi", "--force", *built.values())


@pytest.fixture(scope="module")
def machine(
    directory: Path, tools: Path, registry: Registry, provider: str, images: dict[str, str]
) -> Iterator[Machine]:
    key = registry.new_key(directory / "release")
    for name, reference in images.items():
        if name != "unsigned":
            registry.sign(reference, key)
    ports = {"staging": free_port(), "production": free_port()}
    for environment, port in ports.items():
        home = directory / environment
        subprocess.run([ROOT / "deploy" / "compose" / "make-secrets.sh", home], check=True, capture_output=True)
        (home / "secrets" / "openai_api_key").write_text(f"sk-{environment}-secret\n")
        (home / "settings.env").write_text(
            f"API_PORT={port}\nAGENTS=drill\nOPENAI_BASE_URL=http://{provider}:8080/v1\n"
        )
        (home / "compose.yml").write_text(OF_THIS_MACHINE.format(provider=provider))
    machine = Machine(directory, f"drill-{uuid4().hex[:8]}", ports, key, tools, images)
    yield machine
    machine.remove()


def digest_of(reference: str) -> str:
    return reference.partition("@")[2]


def test_production_differs_from_staging_in_its_name_its_port_and_its_workers_alone() -> None:
    def lines(environment: str) -> list[str]:
        text = (ROOT / "deploy" / "compose" / f"{environment}.yml").read_text().replace(environment, "ENVIRONMENT")
        return [line for line in text.splitlines() if line.partition("#")[0].strip()]

    differing = [pair for pair in zip(lines("staging"), lines("production"), strict=True) if len(set(pair)) == 2]
    assert [(mine.strip(), theirs.strip()) for mine, theirs in differing] == [
        ("- 127.0.0.1:${API_PORT:-8100}:8000", "- 127.0.0.1:${API_PORT:-8200}:8000"),
        ("replicas: ${WORKERS:-1}", "replicas: ${WORKERS:-2}"),
    ]


# -- what is refused before anything is touched


@pytest.mark.parametrize(
    "name", ["{name}:first", "{name}:first@{digest}", "{name}@{digest}0", "{digest}", "-{name}@{digest}"]
)
def test_what_is_not_a_digest_is_refused(machine: Machine, name: str) -> None:
    repository, _, digest = machine.images["first"].partition("@")
    refused = machine.promote(name.format(name=repository, digest=digest), "staging")
    assert refused.returncode == 2
    assert "name the image by its digest alone" in refused.stdout


@pytest.mark.parametrize(
    ("environment", "env", "why"),
    [
        ("development", {}, "there is no environment 'development'"),
        ("staging", {"CONFIG": "/nowhere"}, "there is no folder /nowhere/staging/secrets"),
        ("staging", {"COSIGN_PUBLIC_KEY": ""}, "who has to have signed the image?"),
        ("staging", {"COSIGN_PUBLIC_KEY": "/nowhere.pub"}, "/nowhere.pub cannot be read"),
    ],
)
def test_wrong_usage_is_exit_code_2(machine: Machine, environment: str, env: dict[str, str], why: str) -> None:
    refused = machine.promote(machine.images["first"], environment, **env)
    assert refused.returncode == 2
    assert why in refused.stdout


def test_an_unsigned_image_is_refused(machine: Machine) -> None:
    refused = machine.promote(machine.images["unsigned"], "staging")
    assert refused.returncode == 1
    assert f"refused: the signature of {machine.images['unsigned']} does not hold" in refused.stdout
    assert machine.containers("staging") == machine.containers("staging-candidate") == []


def test_an_image_that_somebody_else_signed_is_refused(machine: Machine, registry: Registry, directory: Path) -> None:
    stranger = registry.new_key(directory / "stranger")
    refused = machine.promote(machine.images["first"], "staging", COSIGN_PUBLIC_KEY=f"{stranger}.pub")
    assert refused.returncode == 1
    assert "refused: the signature of" in refused.stdout


def test_a_signature_that_is_in_no_public_log_is_refused_unless_that_is_allowed(machine: Machine) -> None:
    refused = machine.promote(machine.images["first"], "staging", COSIGN_WITHOUT_LOG="")
    assert refused.returncode == 1
    assert "refused: the signature of" in refused.stdout


def test_production_takes_nothing_that_staging_does_not_run(machine: Machine) -> None:
    refused = machine.promote(machine.images["first"], "production")
    assert refused.returncode == 1
    assert f"staging does not run {machine.images['first']}" in refused.stdout
    assert machine.containers("production") == []


# -- to staging, to production


def test_an_image_that_does_not_pass_at_first_leaves_nothing_running(machine: Machine) -> None:
    refused = machine.promote(machine.images["broken"], "staging")
    assert refused.returncode == 1, refused.stdout
    assert "stop reason internal_error" in refused.stdout, refused.stdout
    assert "the candidate did not pass" in refused.stdout
    assert machine.containers("staging") == machine.containers("staging-candidate") == []


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_the_same_digest_goes_to_staging_and_then_to_production(machine: Machine, environment: str) -> None:
    first = machine.images["first"]
    passed = machine.promote(first, environment)
    assert passed.returncode == 0, passed.stdout
    assert passed.stdout.splitlines()[-1] == f"promote: runs in {environment}: {first}"
    assert passed.stdout.count("smoke: passed") == 2
    assert machine.version(environment)["environment"] == environment
    assert machine.version(environment)["image_digest"] == digest_of(first)
    assert machine.containers(f"{environment}-candidate") == []
    for service, instances in {"api": 1, "worker": 1 if environment == "staging" else 2}.items():
        running = [inspect(container) for container in machine.containers(environment, service)]
        assert [container["Config"]["Image"] for container in running] == [first] * instances


def test_each_role_has_its_own_secrets_as_files_and_none_in_its_environment(machine: Machine) -> None:
    shared = {"database_url", "webhook_signing_key"}
    secrets = machine.config / "staging" / "secrets"
    values = [file.read_text().strip() for file in secrets.iterdir()]
    for service, expected in {"api": shared, "worker": shared | {"openai_api_key", "audit_signing_key"}}.items():
        [container] = machine.containers("staging", service)
        assert set(docker("exec", container, "ls", "/run/secrets").split()) == expected
        told = "\n".join(inspect(container)["Config"]["Env"])
        assert not [value for value in values if value in told]
        assert "STAND_IN_MODEL_URL" not in told


# -- and back


def test_an_image_that_fails_in_place_is_replaced_by_the_one_before_and_no_run_is_lost(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    with machine.client("staging") as client:
        with Customers(client) as customers:
            failed = machine.promote(machine.images["treacherous"], "staging")
        assert failed.returncode == 1
        assert "stop reason internal_error" in failed.stdout, failed.stdout
        assert "it did not pass in staging" in failed.stdout
        assert failed.stdout.splitlines()[-1] == f"promote: back in staging: {machine.images['first']}"
        assert machine.version("staging")["image_digest"] == digest_of(machine.images["first"])

        assert len(customers.runs) > 20

        def open_runs() -> list[str]:
            ended = {run: client.get(f"/v1/runs/{run}").json()["status"] for run in customers.runs}
            assert set(ended.values()) <= {"queued", "running", "succeeded"}
            return [run for run, status in ended.items() if status != "succeeded"]

        until(lambda: not open_runs())
    with capsys.disabled():
        print(
            f"\n  {len(customers.runs)} runs, the API away for {customers.seconds_away:.1f} s at most, twice replaced"
        )
    assert customers.seconds_away < SECONDS_AWAY


def test_a_promotion_that_is_interrupted_goes_back_and_excludes_others_meanwhile(machine: Machine) -> None:
    process = machine.start(machine.images["treacherous"], "staging")
    assert process.stdout is not None
    excluded = None
    said = []
    for line in process.stdout:
        said.append(line)
        if "a candidate is started" in line:
            excluded = machine.promote(machine.images["first"], "production")
        if "API and workers of staging are replaced" in line:
            time.sleep(1)
            os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
    assert process.wait(60) == 130
    assert excluded is not None
    assert excluded.returncode == 1
    assert "another promotion is under way" in excluded.stdout
    process.stdout.close()
    assert said[-1] == f"promote: back in staging: {machine.images['first']}\n", "".join(said)
    assert machine.version("staging")["image_digest"] == digest_of(machine.images["first"])
    refused = machine.promote(machine.images["treacherous"], "production")
    assert "staging does not run" in refused.stdout


def test_production_ran_the_same_digest_all_the_time(machine: Machine) -> None:
    assert machine.version("production")["image_digest"] == digest_of(machine.images["first"])
    with machine.client("production") as client:
        run = client.post("/v1/runs", json={"agent": "support", "input": "How long do I have to return it?"}).json()
        until(lambda: client.get(f"/v1/runs/{run['id']}").json()["status"] == "succeeded")
