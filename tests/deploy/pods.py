"""Kubernetes, and Cloud Run, which writes containers in the same way."""

import subprocess
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from tests.deploy.tools import ROOT
from tests.deploy.workload import DEPLOY, Probe, Target, Workload, documents, metrics_api, walk

CLOUD_RUN_GRACE_SECONDS = 10.0
"""Not configurable, for services, jobs and worker pools alike."""
KUBERNETES_GRACE_SECONDS = 30.0

Manifest = Mapping[str, Any]
Stores = Mapping[str, Mapping[str, str]]
"""What ConfigMaps hold, and where the values in Secrets come from; by name and key."""


@cache
def cloud_run() -> Target:
    folder = DEPLOY / "cloudrun"
    workloads = []
    for manifest in documents(folder / "service.yaml", folder / "worker-pool.yaml", folder / "migrate-job.yaml"):
        pod = next(each for each in walk(manifest) if "containers" in each)
        (container,) = pod["containers"]
        # A secret's key is its version.
        plain = {each["name"]: each["value"] for each in container["env"] if "value" in each}
        kept = {
            each["name"]: "{name}/versions/{key}".format(**each["valueFrom"]["secretKeyRef"])
            for each in container["env"]
            if "valueFrom" in each
        }
        workloads.append(_workload("cloudrun", container, pod, plain=plain, secret=kept, grace=CLOUD_RUN_GRACE_SECONDS))
    (config,) = documents(folder / "crema.yaml")
    (scaled,) = config["spec"]["scaledObjects"]
    bounds = scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]
    return Target("cloudrun", tuple(workloads), metrics_api("cloudrun", config, *bounds))


@cache
def kubernetes(overlay: str) -> Target:
    name = f"kubernetes/{overlay}"
    built = subprocess.run(
        [ROOT / ".ci" / "kustomize", DEPLOY / "kubernetes" / "overlays" / overlay],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    manifests = [each for each in yaml.safe_load_all(built.stdout) if each]
    configured = {each["metadata"]["name"]: each["data"] for each in manifests if each["kind"] == "ConfigMap"}
    kept = {
        each["spec"]["target"]["name"]: {
            item["secretKey"]: "{key}/versions/{version}".format(**item["remoteRef"]) for item in each["spec"]["data"]
        }
        for each in manifests
        if each["kind"] == "ExternalSecret"
    }
    pods = [each["spec"]["template"]["spec"] for each in manifests if each["kind"] in {"Deployment", "Job"}]
    workloads = [_kubernetes_workload(name, pod, configured, kept) for pod in pods]
    (scaled,) = (each for each in manifests if each["kind"] == "ScaledObject")
    bounds = scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]
    return Target(name, tuple(workloads), metrics_api(name, scaled, *bounds))


def _kubernetes_workload(target: str, pod: Manifest, configured: Stores, kept: Stores) -> Workload:
    (container,) = pod["containers"]
    plain: dict[str, str] = {}
    secret: dict[str, str] = {}
    for source in container.get("envFrom", []):
        plain |= configured[source["configMapRef"]["name"]]
    for variable in container.get("env", []):
        if "value" in variable:
            plain[variable["name"]] = variable["value"]
            continue
        reference = variable["valueFrom"]["secretKeyRef"]
        if reference["key"] in kept[reference["name"]] or not reference.get("optional"):
            secret[variable["name"]] = kept[reference["name"]][reference["key"]]
    # The clock runs from before preStop, the signal comes after it.
    before_the_signal = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    grace = float(pod.get("terminationGracePeriodSeconds", KUBERNETES_GRACE_SECONDS)) - before_the_signal
    return _workload(target, container, pod, plain=plain, secret=secret, grace=grace)


def _workload(
    target: str,
    container: Manifest,
    pod: Manifest,
    *,
    plain: Mapping[str, str],
    secret: Mapping[str, str],
    grace: float,
) -> Workload:
    arguments = tuple(container.get("args", ()))
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    probes = [probe["httpGet"] for name, probe in container.items() if name.endswith("Probe")]
    security = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
    user = security.get("runAsUser")
    return Workload(
        target=target,
        role=arguments[0] if arguments else "?",
        image=container["image"],
        entry_point=tuple(container.get("command", ())),
        arguments=arguments,
        plain=plain,
        secret=secret,
        grace=grace,
        probes=tuple(Probe(probe["path"], ports.get(probe["port"], probe["port"])) for probe in probes),
        ports=tuple(ports.values()),
        user=None if user is None else str(user),
        read_only=security.get("readOnlyRootFilesystem"),
    )
