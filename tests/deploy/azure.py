"""Azure Container Apps, whose manifests are asked of the script that fills them in."""

import subprocess
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from tests.deploy.workload import DEPLOY, IMAGE, Probe, Target, Workload, metrics_api, walk

GRACE_SECONDS = 30.0


@cache
def container_apps(environment: str) -> Target:
    name = f"container-apps/{environment}"
    workloads, scaler = [], None
    for app in ("api", "worker", "migrate"):
        properties = _printed(app, environment)["properties"]
        template, configuration = properties["template"], properties["configuration"]
        (container,) = template["containers"]
        grace = float(template.get("terminationGracePeriodSeconds", GRACE_SECONDS))
        workloads.append(_app(name, container, configuration, grace))
        scale = template.get("scale", {})
        if any("valueLocation" in each for each in walk(scale)):
            scaler = metrics_api(name, scale, scale["minReplicas"], scale["maxReplicas"])
    return Target(name, tuple(workloads), scaler)


def _printed(app: str, environment: str) -> dict[str, Any]:
    command = [str(DEPLOY / "container-apps" / "deploy.sh"), "--print", app, environment, IMAGE]
    printed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    manifest: dict[str, Any] = yaml.safe_load(printed.stdout)
    return manifest


def _app(target: str, container: Mapping[str, Any], configuration: Mapping[str, Any], grace: float) -> Workload:
    kept = {each["name"]: each.get("keyVaultUrl", "") for each in configuration.get("secrets", [])}
    variables = container.get("env", [])
    arguments = tuple(container.get("args", ()))
    probes = [probe["httpGet"] for probe in container.get("probes", []) if "httpGet" in probe]
    port = configuration.get("ingress", {}).get("targetPort")
    return Workload(
        target=target,
        role=arguments[0] if arguments else "?",
        image=container["image"],
        entry_point=tuple(container.get("command", ())),
        arguments=arguments,
        plain={each["name"]: str(each["value"]) for each in variables if "value" in each},
        secret={each["name"]: kept[each["secretRef"]] for each in variables if "secretRef" in each},
        grace=grace,
        probes=tuple(Probe(probe["path"], int(probe["port"])) for probe in probes),
        ports=(int(port),) if port else (),
    )
