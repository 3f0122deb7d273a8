"""ECS and Lambda, from their CloudFormation templates."""

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from tests.deploy.cloudformation import read_template
from tests.deploy.workload import DEPLOY, IMAGE, Probe, Scaler, Target, Workload

SECRETS = ("OwnerDatabaseUrl", "DatabaseUrl", "RedisUrl", "WebhookSigningKey", "OpenaiApiKey", "AuditSigningKey")
"""Parameters that take the ARN of a secret with a version, and nothing else: reading the template checks it."""
A_SECRET = f"arn:aws:secretsmanager:REGION:{'0' * 12}:secret:agent-service/name-AbCdEf:::{'0' * 32}"
FARGATE_GRACE_SECONDS = 30.0
FARGATE_MOST_GRACE_SECONDS = 120.0


@cache
def ecs() -> Target:
    resources: dict[str, Any] = {}
    for path in sorted((DEPLOY / "ecs").glob("*.y*ml")):
        resources |= read_template(path, Image=IMAGE, **dict.fromkeys(SECRETS, A_SECRET)).get("Resources", {})
    of_balancer = {
        Probe(each["HealthCheckPath"], int(each["Port"]))
        for each in properties(resources, "AWS::ElasticLoadBalancingV2::TargetGroup")
    }
    workloads = [
        _task(container, of_balancer)
        for each in properties(resources, "AWS::ECS::TaskDefinition")
        for container in each["ContainerDefinitions"]
    ]
    return Target("ecs", tuple(workloads), _function_that_scales(resources))


def properties(resources: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    return [each["Properties"] for each in resources.values() if each["Type"] == kind]


def _task(container: Mapping[str, Any], of_balancer: set[Probe]) -> Workload:
    arguments = tuple(container.get("Command", ()))
    ports = tuple(int(port["ContainerPort"]) for port in container.get("PortMappings", []))
    command = json.dumps(container.get("HealthCheck", {}).get("Command", []))
    asked = [Probe(path, int(port)) for port, path in re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", command)]
    grace = float(container.get("StopTimeout", FARGATE_GRACE_SECONDS))
    return Workload(
        target="ecs",
        role=arguments[0] if arguments else container["Name"],
        image=container["Image"],
        entry_point=tuple(container.get("EntryPoint", ())),
        arguments=arguments,
        plain={each["Name"]: str(each["Value"]) for each in container.get("Environment", [])},
        secret={each["Name"]: str(each["ValueFrom"]) for each in container.get("Secrets", [])},
        grace=min(grace, FARGATE_MOST_GRACE_SECONDS),
        probes=(*asked, *(probe for probe in of_balancer if probe.port in ports)),
        ports=ports,
        user=container.get("User"),
        read_only=bool(container.get("ReadonlyRootFilesystem")),
        has_health_command="healthcheck" in container.get("HealthCheck", {}).get("Command", []),
    )


def _function_that_scales(resources: Mapping[str, Any]) -> Scaler:
    """It sets what the service asks for, whose bounds so are the only ones."""
    functions = properties(resources, "AWS::Lambda::Function")
    code = next(each["Code"]["ZipFile"] for each in functions if "update_service" in json.dumps(each))
    others = [
        each
        for each in properties(resources, "AWS::ApplicationAutoScaling::ScalableTarget")
        if "${Api." not in each["ResourceId"]
    ]
    return Scaler(
        target="ecs",
        text=code + json.dumps(others),
        url="".join(re.findall(r"/v1/\w+", code)),
        value="".join(re.findall(r'\["(\w+_workers)"\]', code)),
        per_worker="1",
        minimum=None,
        maximum=None,
    )


@cache
def aws_lambda() -> Target:
    """The API alone. Its image has one of ours inside, and a secret is a reference that CloudFormation resolves."""
    workloads = []
    for path in sorted((DEPLOY / "lambda").glob("*.y*ml")):
        resources = read_template(path).get("Resources", {})
        for kind in ("AWS::Serverless::Function", "AWS::Lambda::Function"):
            workloads += [_function(each) for each in properties(resources, kind)]
    return Target("lambda", tuple(workloads), scaler=None)


def _function(function: Mapping[str, Any]) -> Workload:
    image = function.get("ImageUri") or function["Code"]["ImageUri"]
    variables = function["Environment"]["Variables"]
    secret = {name: str(value) for name, value in variables.items() if "{{resolve:" in str(value)}
    plain = {name: str(value) for name, value in variables.items() if name not in secret}
    return Workload("lambda", "api", image, arguments=("api",), plain=plain, secret=secret)
