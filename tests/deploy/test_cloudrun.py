"""What deploy/cloudrun consists of: manifests that Cloud Run's API knows, and commands that gcloud understands."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.cloudrun_schema import annotations, discovery, json_schema
from tests.deploy.cloudrun_stand_in import real_gcloud
from tests.deploy.tools import ROOT, accepts
from tests.deploy.workload import walk

FOLDER = ROOT / "deploy" / "cloudrun"
MANIFESTS = {"service": "Service", "worker-pool": "WorkerPool", "migrate-job": "Job", "crema-service": "Service"}
DIGEST = f"sha256:{'3c' * 32}"
IMAGE = f"europe-west1-docker.pkg.dev/some-project/agent-service/agent-service@{DIGEST}"
VALUES = {
    "IMAGE": IMAGE,
    "ENVIRONMENT": "staging",
    "PROJECT_ID": "some-project",
    "REGION": "europe-west1",
    "NETWORK": "agent-service",
    "SUBNETWORK": "agent-service",
    "AUDIT_BUCKET": "some-project-audit",
    "LANGFUSE_HOST": "https://langfuse.example.com",
    "LANGFUSE_PUBLIC_KEY": "pk-lf-example",
    "CANDIDATE": "candidate-2",
    "SERVING": "serving-1",
    "WORKER_INSTANCES": "4",
    "API_URL": "https://agents.example.com",
    "CREMA_DIGEST": f"sha256:{'4d' * 32}",
    "CREMA_BASE_IMAGE": "us-central1-docker.pkg.dev/serverless-runtimes/google-24/runtimes/java25",
    "CREMA_VERSION": "c-0123456789ab",
    **{
        f"{name}_VERSION": "7"
        for name in (
            *("DATABASE_URL", "OWNER_DATABASE_URL", "REDIS_URL", "WEBHOOK_SIGNING_KEY", "OPENAI_API_KEY"),
            *("AUDIT_SIGNING_KEY", "LANGFUSE_SECRET_KEY", "SCALING_KEY"),
        )
    },
}


def render(name: str, **values: str) -> subprocess.CompletedProcess[str]:
    """With exactly these values; an empty one is left out."""
    given = {key: value for key, value in (VALUES | values).items() if value}
    command = [sys.executable, "-I", "-S", str(FOLDER / "render.py"), str(FOLDER / f"{name}.yaml")]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


def rendered(name: str) -> dict[str, Any]:
    done = render(name)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = yaml.safe_load(done.stdout)
    return document


def annotated(document: dict[str, Any]) -> dict[str, str]:
    """Every annotation, wherever it is."""
    return {
        name: value for part in walk(document) if "annotations" in part for name, value in part["annotations"].items()
    }


@pytest.mark.parametrize("name", MANIFESTS)
def test_cloud_runs_api_knows_every_field(name: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(json_schema(MANIFESTS[name])))
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(rendered(name)))
    accepts("check-jsonschema", "--schemafile", tmp_path / "schema.json", tmp_path / f"{name}.yaml")


def test_a_field_that_cloud_runs_api_does_not_know_is_found(tmp_path: Path) -> None:
    document = rendered("worker-pool")
    document["spec"]["template"]["spec"]["containers"][0]["startupProbes"] = {}
    (tmp_path / "schema.json").write_text(json.dumps(json_schema("WorkerPool")))
    (tmp_path / "worker-pool.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(pytest.fail.Exception, match="startupProbes"):
        accepts("check-jsonschema", "--schemafile", tmp_path / "schema.json", tmp_path / "worker-pool.yaml")


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_annotation_is_where_cloud_run_reads_it(name: str) -> None:
    known = annotations()
    document = rendered(name)
    at_the_top, below = document["metadata"].get("annotations", {}), document["spec"]["template"]["metadata"]
    # The document lists the scaling of services alone; worker pools have the same two.
    top = {"Service"} if MANIFESTS[name] in {"Service", "WorkerPool"} else {"Job"}
    bottom = {"Execution"} if MANIFESTS[name] == "Job" else {"Revision"}
    for annotation in at_the_top:
        assert known[annotation] & top, annotation
    for annotation in below.get("annotations", {}):
        assert known[annotation] & bottom, annotation
    assert set(annotated(document)) == {*at_the_top, *below.get("annotations", {})}


@pytest.mark.parametrize("name", ["service", "worker-pool", "migrate-job"])
def test_what_is_ours_reaches_postgres_and_redis_through_the_private_network(name: str) -> None:
    given = annotated(rendered(name))
    assert json.loads(given["run.googleapis.com/network-interfaces"]) == [
        {"network": "agent-service", "subnetwork": "agent-service"}
    ]
    assert given["run.googleapis.com/vpc-access-egress"] == "private-ranges-only"


def test_every_role_has_a_service_account_of_its_own() -> None:
    accounts = [
        next(part["serviceAccountName"] for part in walk(rendered(name)) if "serviceAccountName" in part)
        for name in MANIFESTS
    ]
    assert len(set(accounts)) == len(accounts)
    assert all(account.endswith("@some-project.iam.gserviceaccount.com") for account in accounts)


@pytest.mark.parametrize("name", ["service", "worker-pool", "migrate-job"])
def test_secrets_are_given_by_version(name: str) -> None:
    references = [part["secretKeyRef"] for part in walk(rendered(name)) if "secretKeyRef" in part]
    assert references
    assert {reference["key"] for reference in references} == {"7"}
    refused = render(name, DATABASE_URL_VERSION="latest")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "DATABASE_URL_VERSION is malformed: 'latest'" in refused.stderr


def test_the_api_goes_on_working_between_requests_and_asks_the_platform_for_nothing() -> None:
    given = annotated(rendered("service"))
    assert given["run.googleapis.com/cpu-throttling"] == "false"
    assert given["run.googleapis.com/invoker-iam-disabled"] == "true"
    assert "autoscaling.knative.dev/minScale" not in given, "a candidate would keep instances running"


def test_a_request_may_take_as_long_as_the_longest_wait() -> None:
    from app.api.runs import MAX_WAIT_SECONDS

    assert rendered("service")["spec"]["template"]["spec"]["timeoutSeconds"] > MAX_WAIT_SECONDS


@pytest.mark.parametrize("name", ["service", "worker-pool"])
def test_a_probe_is_no_shorter_than_what_it_asks_takes(name: str) -> None:
    from worker.health import PROBE_SECONDS

    (container,) = rendered(name)["spec"]["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert PROBE_SECONDS < probe["timeoutSeconds"] <= probe["periodSeconds"]
    assert probe["failureThreshold"] * probe["periodSeconds"] <= 240, "Cloud Run's own limit"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"


def test_a_candidate_has_an_address_and_no_traffic() -> None:
    service = rendered("service")["spec"]
    assert service["template"]["metadata"]["name"] == "candidate-2"
    assert service["traffic"] == [
        {"revisionName": "serving-1", "percent": 100},
        {"revisionName": "candidate-2", "percent": 0, "tag": "candidate"},
    ]
    assert rendered("worker-pool")["spec"]["instanceSplits"] == [{"revisionName": "serving-1", "percent": 100}]


def test_a_deployment_leaves_the_number_of_workers_to_crema() -> None:
    given = annotated(rendered("worker-pool"))
    assert given["run.googleapis.com/scalingMode"] == "manual"
    assert given["run.googleapis.com/manualInstanceCount"] == "4"


def test_crema_sets_the_instances_to_the_number_and_takes_them_away_slowly() -> None:
    config = rendered("crema")
    ((scaled,), (authentication,)) = config["spec"]["scaledObjects"], config["spec"]["triggerAuthentications"]
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["type"] == "metrics-api"
    assert trigger["metricType"] == "AverageValue", "Value multiplies by the instances that there are"
    assert trigger["metadata"]["url"] == "https://agents.example.com/v1/scaling"
    assert trigger["metadata"]["authMode"] == "bearer"
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    (secret,) = authentication["spec"]["gcpSecretManager"]["secrets"]
    assert secret == {"parameter": "token", "id": "agent-service-scaling-key", "version": "7"}
    pool = rendered("worker-pool")["metadata"]["name"]
    expected = f"projects/some-project/locations/europe-west1/workerpools/{pool}"
    assert scaled["spec"]["scaleTargetRef"]["name"] == expected
    behavior = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] >= 300
    # What CREMA ignores would only seem to work.
    assert not {"cooldownPeriod", "pollingInterval", "fallback"} & set(scaled["spec"])
    assert "scalingModifiers" not in scaled["spec"]["advanced"]


def test_cremas_container_stands_on_the_runtime_it_lacks() -> None:
    document = rendered("crema-service")
    spec = document["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["image"].endswith(f"/crema-v1/autoscaler@{VALUES['CREMA_DIGEST']}")
    assert json.loads(annotated(document)["run.googleapis.com/base-images"]) == {
        container["name"]: VALUES["CREMA_BASE_IMAGE"]
    }
    assert spec["runtimeClassName"] == "run.googleapis.com/linux-base-image-update"
    assert annotated(document)["run.googleapis.com/manualInstanceCount"] == "1", "two would compete"


@pytest.mark.parametrize("name", [*MANIFESTS, "crema"])
def test_nothing_is_deployed_with_a_placeholder_left(name: str) -> None:
    manifest = (FOLDER / f"{name}.yaml").read_text()
    needed = set(re.findall(r"\$\{(\w+)\}", manifest))
    needed |= {"IMAGE"} if "registry.example.com" in manifest else set()
    needed |= {"CREMA_DIGEST"} if "autoscaler@" in manifest else set()
    for missing in needed:
        refused = render(name, **{missing: ""})
        assert (refused.returncode, refused.stdout) == (2, "")
        assert f"{missing} is not set" in refused.stderr
    filled = render(name).stdout
    assert not [mark for mark in ("${", 64 * "0", "registry.example.com") if mark in filled]


@pytest.mark.parametrize(
    "image",
    ["agent-service", "registry.example.net/agent-service:latest", f"{IMAGE[:-1]}", IMAGE.upper(), f"{IMAGE} x"],
)
def test_an_image_is_rendered_by_its_digest_alone(image: str) -> None:
    refused = render("service", IMAGE=image)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "IMAGE is malformed" in refused.stderr


def test_a_value_cannot_end_its_line_in_a_manifest() -> None:
    refused = render("service", NETWORK='x"}]\nevil: true')
    assert (refused.returncode, refused.stdout) == (2, "")


def test_the_environments_files_name_everything_that_the_manifests_need() -> None:
    by_script = {"IMAGE", "CANDIDATE", "SERVING", "WORKER_INSTANCES", "API_URL", "CREMA_VERSION"}
    for environment in ("staging", "production"):
        lines = (FOLDER / f"{environment}.env").read_text().splitlines()
        given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
        assert set(VALUES) - by_script <= set(given)
        assert given["ENVIRONMENT"] == environment


def test_the_gate_asks_what_cloud_monitoring_answers() -> None:
    listed = discovery("monitoring.v3")["resources"]["projects"]["resources"]["timeSeries"]["methods"]["list"]
    asked = set(re.findall(r'"((?:aggregation|interval)\.\w+|filter)"', (FOLDER / "gate.py").read_text()))
    assert asked <= set(listed["parameters"])
    assert "ALIGN_DELTA" in listed["parameters"]["aggregation.perSeriesAligner"]["enum"]
    assert "REDUCE_SUM" in listed["parameters"]["aggregation.crossSeriesReducer"]["enum"]


def test_the_scripts_are_without_what_shellcheck_knows() -> None:
    accepts("shellcheck", "-x", *sorted(FOLDER.glob("*.sh")))


def commands(readme: Path) -> list[list[str]]:
    """Every gcloud command of a page, with something in the place of its variables."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        if line.startswith("gcloud ") or "| gcloud " in line or "; do gcloud " in line or "$(gcloud " in line:
            command = re.split(r"\$\(|\| |; do ", line)[-1].split("; done")[0].rstrip(")")
            found.append(
                shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda match: VALUES.get(match[1], "some-value"), command))
            )
    return found


def is_newer(command: str, said: str) -> bool:
    """Is it the one command that came after gcloud 528, which Google's page on CREMA has?"""
    newer = "beta run worker-pools add-iam-policy-binding"
    return newer in command and "Invalid choice: 'add-iam-policy-binding'" in said


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
@pytest.mark.parametrize("page", ["deploy/cloudrun/README.md", "README.md"])
def test_gcloud_understands_every_command_of_the_pages(page: str, tmp_path: Path) -> None:
    found = commands(ROOT / page)
    assert page == "README.md" or len(found) > 10
    manifest = tmp_path / "file.yaml"
    manifest.write_text("{}")
    with ThreadPoolExecutor(2) as threads:
        results = threads.map(lambda command: (command, real_gcloud(command[1:], tmp_path)), found)
        refused = {shlex.join(command): done.stderr for command, done in results if done.returncode != 1}
    refused = {command: said for command, said in refused.items() if not is_newer(command, said)}
    assert not refused, "\n".join(f"{command}\n{said}" for command, said in refused.items())
