"""Every deployment target, by its name, as its manifests in the repository say it.

What only a script fills in stays as `${NAME}`.
"""

from collections.abc import Callable

from tests.deploy.aws import aws_lambda, ecs
from tests.deploy.azure import container_apps
from tests.deploy.compose import compose
from tests.deploy.pods import cloud_run, kubernetes
from tests.deploy.workload import Target, Workload

ROLES = ("api", "worker", "migrate")
TARGETS: dict[str, Callable[[], Target]] = {
    "compose/staging": lambda: compose("staging"),
    "compose/production": lambda: compose("production"),
    "cloudrun": cloud_run,
    "kubernetes/staging": lambda: kubernetes("staging"),
    "kubernetes/production": lambda: kubernetes("production"),
    "ecs": ecs,
    "container-apps/staging": lambda: container_apps("staging"),
    "container-apps/production": lambda: container_apps("production"),
    "lambda": aws_lambda,
}


def expected() -> list[tuple[str, str]]:
    """Every role at every target: all of them, and on Lambda the API alone."""
    return [(target, role) for target in TARGETS for role in ROLES if target != "lambda" or role == "api"]


def workload(target: str, role: str) -> Workload:
    found = [each for each in TARGETS[target]().workloads if each.role == role]
    assert len(found) == 1, f"{target} has {len(found)} times {role}"
    return found[0]
