"""What is special to Azure Container Apps: its manifests, as deploy.sh fills them in."""

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import ROOT, tool

FOLDER = ROOT / "deploy" / "container-apps"
ENVIRONMENTS = ("staging", "production")
ROLES = ("api", "worker", "migrate")
DIGEST = "sha256:" + "5a" * 32
IMAGE = f"example.azurecr.io/agent-service@{DIGEST}"
MOST_GRACE_SECONDS = 600

Manifest = dict[str, Any]


def deploy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([FOLDER / "deploy.sh", *arguments], capture_output=True, text=True, check=False)


@cache
def manifest(role: str, environment: str = "staging") -> Manifest:
    printed = deploy("--print", role, environment, IMAGE)
    assert printed.returncode == 0, printed.stderr
    read: Manifest = yaml.safe_load(printed.stdout)
    return read


def configuration(role: str, environment: str = "staging") -> Manifest:
    found: Manifest = manifest(role, environment)["properties"]["configuration"]
    return found


def template(role: str) -> Manifest:
    found: Manifest = manifest(role)["properties"]["template"]
    return found


def container(role: str) -> Manifest:
    (only,) = template(role)["containers"]
    found: Manifest = only
    return found


def variables(role: str) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(role)["env"] if "value" in entry}


def references(role: str) -> dict[str, str]:
    return {entry["name"]: entry["secretRef"] for entry in container(role)["env"] if "secretRef" in entry}


def complaints(model: str, given: Manifest) -> list[str]:
    """What the SDK's models have against a manifest."""
    program = Path(__file__).with_name("container_apps_fields.py")
    asked = subprocess.run(
        [tool("python"), "-P", program], input=json.dumps([model, given]), capture_output=True, text=True, check=True
    )
    return asked.stdout.split("\n")[:-1] if asked.stdout.strip() else []


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize(("role", "model"), [("api", "ContainerApp"), ("worker", "ContainerApp"), ("migrate", "Job")])
def test_azure_knows_every_field(role: str, model: str, environment: str) -> None:
    assert complaints(model, manifest(role, environment)) == []


def test_a_field_that_azure_does_not_know_is_found() -> None:
    broken = json.loads(json.dumps(manifest("worker")))
    properties = broken["properties"]
    properties["template"]["scale"]["rules"][0]["custom"]["autentication"] = []
    properties["template"]["terminationGracePeriodSeconds"] = "120"
    properties["configuration"]["activeRevisionsMode"] = "One"
    properties["template"]["containers"][0]["probes"][0]["httpGet"]["ports"] = 1
    assert len(complaints("ContainerApp", broken)) == 4


def test_an_image_is_taken_by_its_digest_only_and_every_process_is_told_it() -> None:
    for role in ROLES:
        assert container(role)["image"] == IMAGE
        assert configuration(role)["registries"][0]["server"] == "example.azurecr.io"
    for role in ("api", "worker"):
        assert variables(role)["IMAGE_DIGEST"] == DIGEST


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["staging"],
        ["development", IMAGE],
        ["--print", "model", "staging", IMAGE],
        ["staging", "registry.example.com/agent-service:latest"],
        ["--print", "api", "staging", f"registry.example.com/agent-service@{DIGEST}0"],
    ],
)
def test_what_is_no_image_by_digest_and_no_environment_is_refused(arguments: list[str]) -> None:
    refused = deploy(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "usage: " in refused.stderr or "is not an image by its digest" in refused.stderr


def test_both_environments_are_told_the_same_things() -> None:
    names = [re.findall(r"^([A-Z_]+)=", (FOLDER / f"{name}.env").read_text(), re.M) for name in ENVIRONMENTS]
    assert names[0] == names[1]
    assert [
        manifest("api", name)["properties"]["template"]["containers"][0]["env"][0]["value"] for name in ENVIRONMENTS
    ] == list(ENVIRONMENTS)


def test_an_app_has_the_time_that_it_takes_to_drain() -> None:
    for role in ("api", "worker"):
        grace = template(role)["terminationGracePeriodSeconds"]
        assert float(variables(role)["DRAIN_SECONDS"]) + 2 <= grace <= MOST_GRACE_SECONDS


def test_probes_ask_what_is_there_and_as_often_as_azure_allows() -> None:
    for role, port in (("api", 8000), ("worker", 8001)):
        probes = {probe["type"]: probe for probe in container(role)["probes"]}
        assert {name: probe["httpGet"] for name, probe in probes.items()} == {
            "Startup": {"path": "/health/live", "port": port},
            "Liveness": {"path": "/health/live", "port": port},
            "Readiness": {"path": "/health/ready", "port": port},
        }
        for probe in probes.values():
            assert probe.get("failureThreshold", 3) <= 10
            assert probe["periodSeconds"] <= 240
        startup = probes["Startup"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 30


def test_only_the_api_is_reached_and_by_https_only() -> None:
    ingress = configuration("api")["ingress"]
    assert ingress["targetPort"] == 8000
    assert ingress["allowInsecure"] is False
    assert ingress["external"] is True  # KEDA is outside of the environment
    assert "ingress" not in configuration("worker")


def test_keda_asks_the_service_itself_for_the_one_number() -> None:
    scale = template("worker")["scale"]
    (rule,) = scale["rules"]
    assert rule["custom"] == {
        "type": "metrics-api",
        "metadata": {
            "url": "https://api.staging.example.com/v1/scaling",
            "valueLocation": "desired_workers",
            "targetValue": "1",
            "authMode": "bearer",
        },
        "auth": [{"triggerParameter": "token", "secretRef": "scaling-key"}],
    }
    told = variables("api")
    assert (scale["minReplicas"], scale["maxReplicas"]) == (int(told["MIN_WORKERS"]), int(told["MAX_WORKERS"]))
    assert scale["pollingInterval"] <= float(told["TARGET_DRAIN_SECONDS"]) / 2


@pytest.mark.parametrize("role", ROLES)
def test_every_secret_comes_from_the_vault_by_its_version_as_the_roles_own_identity(role: str) -> None:
    secrets = {secret["name"]: secret for secret in configuration(role)["secrets"]}
    (identity,) = manifest(role)["identity"]["userAssignedIdentities"]
    assert identity.endswith(f"/agent-service-{role}")
    for name, secret in secrets.items():
        assert set(secret) == {"name", "keyVaultUrl", "identity"}
        assert re.fullmatch(rf"https://[a-z-]+\.vault\.azure\.net/secrets/{name}/[0-9a-f]{{32}}", secret["keyVaultUrl"])
        assert secret["identity"] == identity
    assert all(name == reference.upper().replace("-", "_") for name, reference in references(role).items())
    assert set(references(role).values()) == set(secrets) - {"scaling-key"}
    assert ("scaling-key" in secrets) == (role == "worker")


def test_only_the_migration_is_the_databases_owner_and_only_workers_have_the_models_key() -> None:
    shared = {"DATABASE_URL", "REDIS_URL", "WEBHOOK_SIGNING_KEY"}
    assert set(references("api")) == shared
    assert set(references("worker")) == shared | {"OPENAI_API_KEY", "AUDIT_SIGNING_KEY"}
    assert set(references("migrate")) == {"OWNER_DATABASE_URL", "DATABASE_URL"}


def test_only_workers_can_act_as_their_identity() -> None:
    for role in ROLES:
        settings = configuration(role).get("identitySettings", [])
        (identity,) = manifest(role)["identity"]["userAssignedIdentities"]
        assert settings == ([] if role == "worker" else [{"identity": identity, "lifecycle": "None"}])


def test_a_migration_is_started_by_hand_and_runs_once() -> None:
    job = configuration("migrate")
    assert job["triggerType"] == "Manual"
    assert job["manualTriggerConfig"] == {"parallelism": 1, "replicaCompletionCount": 1}
    assert job["replicaTimeout"] <= 900
