"""What is special to Kubernetes: both overlays are built with kustomize, and asked what they say."""

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import Settings
from tests.deploy.tools import ROOT, run

FOLDER = ROOT / "deploy" / "kubernetes"
ENVIRONMENTS = ("staging", "production")
DIGEST = "sha256:" + "5a" * 32
IMAGE = f"europe-docker.pkg.dev/example/agents/agent-service@{DIGEST}"
NAME = "app.kubernetes.io/name"
CUSTOM = {"ScaledObject", "TriggerAuthentication", "ExternalSecret", "SecretStore"}
"""Kinds of KEDA and of external-secrets, whose schemas no tool here has."""

Manifest = dict[str, Any]


def deploy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([FOLDER / "deploy.sh", *arguments], capture_output=True, text=True, check=False)


@cache
def manifests(environment: str) -> tuple[Manifest, ...]:
    """What is applied."""
    printed = deploy("--print", environment, IMAGE)
    assert printed.returncode == 0, printed.stderr
    return tuple(yaml.safe_load_all(printed.stdout))


def of_kind(environment: str, kind: str) -> dict[str, Manifest]:
    """By name."""
    return {each["metadata"]["name"]: each for each in manifests(environment) if each["kind"] == kind}


def one(environment: str, kind: str) -> Manifest:
    (found,) = of_kind(environment, kind).values()
    return found


def workloads(environment: str) -> dict[str, Manifest]:
    """`api`, `worker` and `migrate`."""
    return of_kind(environment, "Deployment") | of_kind(environment, "Job")


def pod(workload: Manifest) -> Manifest:
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def container(workload: Manifest) -> Manifest:
    (only,) = pod(workload)["containers"]
    found: Manifest = only
    return found


def settings(environment: str) -> dict[str, str]:
    found: dict[str, str] = one(environment, "ConfigMap")["data"]
    return found


@pytest.fixture(params=ENVIRONMENTS)
def environment(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_kubernetes_knows_every_field(environment: str, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(manifests(environment)))
    checked = run("kubernetes-validate", "--strict", tmp_path / "all.yaml")
    lines = (checked.stdout + checked.stderr).splitlines()
    assert checked.returncode == 0, "\n".join(line for line in lines if not line.startswith("INFO"))
    unknown = {match[1] for line in lines if (match := re.search(r"Couldn't find schema for kind (\w+)", line))}
    assert unknown == CUSTOM
    assert len([line for line in lines if " passed for resource " in line]) == len(
        [each for each in manifests(environment) if each["kind"] not in CUSTOM]
    )


@pytest.mark.parametrize("cloud", ["gke", "eks", "aks"])
def test_each_cloud_has_its_store_and_its_identities(cloud: str, tmp_path: Path) -> None:
    # kustomize follows no link out of a folder.
    subprocess.run(["cp", "-a", FOLDER, tmp_path / "kubernetes"], check=True)
    overlay = tmp_path / "kubernetes" / "overlays" / "staging"
    kustomization = overlay / "kustomization.yaml"
    kustomization.write_text(kustomization.read_text().replace("components/gke", f"components/{cloud}"))
    built = subprocess.run([ROOT / ".ci" / "kustomize", overlay], capture_output=True, text=True, check=True)
    everything: list[Manifest] = list(yaml.safe_load_all(built.stdout))

    (store,) = [each for each in everything if each["kind"] == "SecretStore"]
    (provider,) = store["spec"]["provider"].items()
    assert provider[0] == {"gke": "gcpsm", "eks": "aws", "aks": "azurekv"}[cloud]
    assert "{'name': 'secrets-reader'}" in str(provider[1])
    accounts = {each["metadata"]["name"]: each["metadata"] for each in everything if each["kind"] == "ServiceAccount"}
    assert {name for name, metadata in accounts.items() if "annotations" in metadata} == {"secrets-reader", "worker"}
    assert len({str(metadata["annotations"]) for metadata in accounts.values() if "annotations" in metadata}) == 2


def test_an_image_is_taken_by_its_digest_only_and_every_process_is_told_it(environment: str) -> None:
    for name, workload in workloads(environment).items():
        assert container(workload)["image"] == IMAGE
        told = [entry for entry in container(workload)["env"] if entry["name"] == "IMAGE_DIGEST"]
        assert told == ([] if name == "migrate" else [{"name": "IMAGE_DIGEST", "value": DIGEST}])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["staging"],
        ["development", IMAGE],
        ["staging", "registry.example.com/agent-service:latest"],
        ["staging", f"registry.example.com/agent-service:latest {DIGEST}"],
        ["staging", f"registry.example.com/agent-service@{DIGEST}0"],
        ["--print", "staging", IMAGE, "more"],
    ],
)
def test_what_is_no_image_by_digest_and_no_environment_is_refused(arguments: list[str]) -> None:
    refused = deploy(*arguments)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "usage: " in refused.stderr or "is not an image by its digest" in refused.stderr


def test_the_environments_share_nothing_but_what_is_the_same_everywhere() -> None:
    namespaces = {one(environment, "Namespace")["metadata"]["name"] for environment in ENVIRONMENTS}
    assert namespaces == {"agent-service-staging", "agent-service-production"}
    keys = [
        {
            entry["remoteRef"]["key"]
            for each in of_kind(name, "ExternalSecret").values()
            for entry in each["spec"]["data"]
        }
        for name in ENVIRONMENTS
    ]
    assert not keys[0] & keys[1]
    hosts = [one(name, "Ingress")["spec"]["rules"][0]["host"] for name in ENVIRONMENTS]
    assert len(set(hosts)) == 2
    assert [settings(name)["ENVIRONMENT"] for name in ENVIRONMENTS] == list(ENVIRONMENTS)
    assert len({settings(name)["AUDIT_ANCHOR"] for name in ENVIRONMENTS}) == 2


def test_everything_is_in_the_environments_namespace(environment: str) -> None:
    for each in manifests(environment):
        if each["kind"] != "Namespace":
            assert each["metadata"]["namespace"] == f"agent-service-{environment}", each["metadata"]["name"]


def test_pods_pass_the_restricted_security_standard(environment: str) -> None:
    labels = one(environment, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for workload in workloads(environment).values():
        spec, only = pod(workload), container(workload)
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert [volume for volume in spec["volumes"] if set(volume) != {"name", "emptyDir"}] == []
        assert only["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
        assert {"cpu", "memory"} <= set(only["resources"]["requests"])
        assert "memory" in only["resources"]["limits"]
        assert "command" not in only  # that is the image's


def test_each_role_runs_as_an_account_of_its_own(environment: str) -> None:
    accounts = of_kind(environment, "ServiceAccount")
    assert {name: pod(workload)["serviceAccountName"] for name, workload in workloads(environment).items()} == {
        "api": "api",
        "worker": "worker",
        "migrate": "migrate",
    }
    assert set(accounts) == {"api", "worker", "migrate", "secrets-reader"}
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())


def test_a_pod_has_the_time_that_it_takes_to_drain(environment: str) -> None:
    drain = float(settings(environment)["DRAIN_SECONDS"])
    for workload in of_kind(environment, "Deployment").values():
        before = container(workload).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod(workload)["terminationGracePeriodSeconds"] >= before + drain + 2
    lifecycle = container(workloads(environment)["api"])["lifecycle"]
    assert lifecycle["preStop"]["sleep"]["seconds"] >= 5  # for endpoints that lag behind


def test_a_worker_that_hangs_ends_itself_before_it_is_killed(environment: str) -> None:
    from worker.main import ENDS_AFTER_LEASES, ENDS_AFTER_SECONDS

    liveness = container(workloads(environment)["worker"])["livenessProbe"]
    lease = float(settings(environment).get("LEASE_SECONDS", Settings.model_fields["lease_seconds"].default))
    patience = max(ENDS_AFTER_LEASES * lease, ENDS_AFTER_SECONDS)
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > patience


def test_services_lead_to_ports_that_are_there(environment: str) -> None:
    deployments = of_kind(environment, "Deployment")
    for service in of_kind(environment, "Service").values():
        name = service["spec"]["selector"][NAME]
        labels = deployments[name]["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        ports = {port["name"]: port["containerPort"] for port in container(deployments[name])["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    backend = one(environment, "Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": "api", "port": {"name": "http"}}


def test_prometheus_finds_each_pod_by_name(environment: str) -> None:
    headless = {
        name: service["spec"]["selector"][NAME]
        for name, service in of_kind(environment, "Service").items()
        if service["spec"].get("clusterIP") == "None" and service["spec"]["publishNotReadyAddresses"]
    }
    assert headless == {"api-pods": "api", "worker": "worker"}


def test_keda_asks_the_service_itself_for_the_one_number(environment: str) -> None:
    scaled = one(environment, "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"] == {"name": "worker"}
    (trigger,) = scaled["triggers"]
    assert trigger == {
        "type": "metrics-api",
        "metadata": {
            "url": f"http://api.agent-service-{environment}.svc:8000/v1/scaling",
            "valueLocation": "desired_workers",
            "targetValue": "1",
            "authMode": "bearer",
        },
        "authenticationRef": {"name": "scaling"},
    }
    authentication = one(environment, "TriggerAuthentication")
    assert authentication["metadata"]["name"] == "scaling"
    (secret,) = authentication["spec"]["secretTargetRef"]
    assert secret == {"parameter": "token", "name": "scaling", "key": "token"}
    assert "metricType" not in trigger  # AverageValue, the default: fallback works with no other


def test_workers_come_at_once_and_go_slowly_and_stay_while_the_api_is_away(environment: str) -> None:
    scaled = one(environment, "ScaledObject")["spec"]
    fewest, most = int(settings(environment)["MIN_WORKERS"]), int(settings(environment)["MAX_WORKERS"])
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (fewest, most)
    behaviour = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behaviour["scaleUp"]["stabilizationWindowSeconds"] == 0
    (up,) = behaviour["scaleUp"]["policies"]
    assert fewest * (1 + up["value"] / 100) >= most  # in one step
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] >= 300
    assert scaled["fallback"] == {
        "failureThreshold": 3,
        "replicas": fewest,
        "behavior": "currentReplicasIfHigher",
    }
    assert scaled["pollingInterval"] <= Settings.model_fields["target_drain_seconds"].default / 2


def test_nobody_else_says_how_many_pods_there_are(environment: str) -> None:
    assert [name for name, each in of_kind(environment, "Deployment").items() if "replicas" in each["spec"]] == []
    target = one(environment, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "api")


def test_a_node_that_is_emptied_moves_one_pod_at_a_time(environment: str) -> None:
    budgets = of_kind(environment, "PodDisruptionBudget")
    assert {name: budget["spec"]["maxUnavailable"] for name, budget in budgets.items()} == {"api": 1, "worker": 1}
    for name, budget in budgets.items():
        assert budget["spec"]["selector"]["matchLabels"] == {NAME: name}


def secrets_used(workload: Manifest) -> Iterator[tuple[str, str]]:
    """The names of the secrets and of their keys, but for the optional ones."""
    for entry in container(workload)["env"]:
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        if reference and not reference.get("optional"):
            yield reference["name"], reference["key"]


def test_every_secret_comes_from_the_store_by_its_version(environment: str) -> None:
    external = of_kind(environment, "ExternalSecret")
    made = {
        (each["spec"]["target"]["name"], entry["secretKey"])
        for each in external.values()
        for entry in each["spec"]["data"]
    }
    used = {each for workload in workloads(environment).values() for each in secrets_used(workload)}
    assert made == used | {("scaling", "token")}
    for each in external.values():
        assert each["apiVersion"] == "external-secrets.io/v1"
        assert each["spec"]["secretStoreRef"] == {"kind": "SecretStore", "name": "store"}
        assert all(entry["remoteRef"]["version"] for entry in each["spec"]["data"])
    assert of_kind(environment, "Secret") == {}
    assert set(of_kind(environment, "SecretStore")) == {"store"}


def test_only_the_migration_is_the_databases_owner_and_only_workers_have_the_models_key(environment: str) -> None:
    has = {name: {key for _, key in secrets_used(workload)} for name, workload in workloads(environment).items()}
    shared = {"DATABASE_URL", "REDIS_URL", "WEBHOOK_SIGNING_KEY"}
    assert has == {
        "api": shared,
        "worker": shared | {"OPENAI_API_KEY", "AUDIT_SIGNING_KEY"},
        "migrate": {"OWNER_DATABASE_URL", "DATABASE_URL"},
    }


# -- networks


def policies(environment: str, role: str, direction: str) -> list[Manifest]:
    """The rules that let a role's pods do something."""
    rules: list[Manifest] = []
    for policy in of_kind(environment, "NetworkPolicy").values():
        selected = policy["spec"]["podSelector"].get("matchLabels", {})
        if not selected or selected == {NAME: role}:
            rules += policy["spec"].get(direction, [])
    return rules


def test_nothing_is_allowed_that_is_not_said(environment: str) -> None:
    nothing = of_kind(environment, "NetworkPolicy")["nothing"]["spec"]
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_only_workers_reach_the_internet_and_nothing_private_by_it(environment: str) -> None:
    def reached(role: str) -> list[Manifest]:
        return [
            peer["ipBlock"]
            for rule in policies(environment, role, "egress")
            for peer in rule["to"]
            if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
        ]

    assert reached("api") == reached("migrate") == []
    (block,) = reached("worker")
    assert set(block["except"]) >= {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"}
    (rule,) = [rule for rule in policies(environment, "worker", "egress") if {"ipBlock": block} in rule["to"]]
    assert rule["ports"] == [{"port": 443}]
    for role in ("api", "worker", "migrate"):
        assert all(rule.get("to") and rule.get("ports") for rule in policies(environment, role, "egress"))


def test_every_role_reaches_postgres_and_redis_and_the_name_servers(environment: str) -> None:
    for role in ("api", "worker", "migrate"):
        ports = {port["port"] for rule in policies(environment, role, "egress") for port in rule["ports"]}
        assert {53, 5432, 6379} <= ports


def test_a_migration_is_reached_by_nobody_and_workers_only_by_prometheus(environment: str) -> None:
    def callers(role: str) -> set[str]:
        found: set[str] = set()
        for rule in policies(environment, role, "ingress"):
            for peer in rule["from"]:
                assert set(peer) == {"namespaceSelector"}
                selector = peer["namespaceSelector"]
                found |= set(selector.get("matchLabels", {}).values())
                for expression in selector.get("matchExpressions", []):
                    assert (expression["key"], expression["operator"]) == ("kubernetes.io/metadata.name", "In")
                    found |= set(expression["values"])
        return found

    assert callers("migrate") == set()
    assert callers("worker") == {"monitoring"}
    assert callers("api") == {"ingress-nginx", "keda", "monitoring"}


# -- the script


def test_a_migration_runs_once_and_gives_up(environment: str) -> None:
    job = of_kind(environment, "Job")["migrate"]
    assert pod(job)["restartPolicy"] == "Never"
    assert job["spec"]["backoffLimit"] <= 3
    assert job["spec"]["activeDeadlineSeconds"] <= 900
