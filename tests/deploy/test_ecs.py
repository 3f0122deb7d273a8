"""What is special to ECS: its two templates, and the function in them that says how many workers there are."""

import json
import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import yaml

from tests.deploy.tools import ROOT, accepts

FOLDER = ROOT / "deploy" / "ecs"
MOST_STOP_SECONDS = 120
"""Fargate's, which cfn-lint does not know."""

Manifest = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Reads CloudFormation's own tags in their long form: `!Ref X` as `{"Ref": "X"}`."""


def _function(loader: _Loader, tag: str, node: yaml.Node) -> Manifest:
    name = tag if tag in ("Ref", "Condition") else f"Fn::{tag}"
    if isinstance(node, yaml.ScalarNode):
        value: Any = loader.construct_scalar(node)
        return {name: value.split(".", 1) if tag == "GetAtt" else value}
    assert isinstance(node, yaml.SequenceNode)
    return {name: loader.construct_sequence(node, deep=True)}


_Loader.add_multi_constructor("!", _function)


def template(name: str) -> Manifest:
    read: Manifest = yaml.load((FOLDER / f"{name}.yaml").read_text(), _Loader)
    return read


PLATFORM, SERVICES = template("platform"), template("services")
RESOURCES: Manifest = PLATFORM["Resources"] | SERVICES["Resources"]


def task(role: str) -> Manifest:
    found: Manifest = RESOURCES[f"{role.capitalize()}Task"]["Properties"]
    return found


def container(role: str) -> Manifest:
    (only,) = task(role)["ContainerDefinitions"]
    found: Manifest = only
    return found


def environment(role: str) -> dict[str, Any]:
    return {entry["Name"]: entry["Value"] for entry in container(role).get("Environment", [])}


def secrets(role: str) -> dict[str, Any]:
    return {entry["Name"]: entry["ValueFrom"] for entry in container(role)["Secrets"]}


def statements(role: str) -> list[Manifest]:
    return [
        statement
        for policy in RESOURCES[role]["Properties"].get("Policies", [])
        for statement in policy["PolicyDocument"]["Statement"]
    ]


def as_list(one_or_more: str | list[str]) -> list[str]:
    return [one_or_more] if isinstance(one_or_more, str) else one_or_more


ROLES = ("api", "worker", "migrate")


def test_cloudformation_knows_every_field() -> None:
    accepts("cfn-lint", *sorted(FOLDER.glob("*.yaml")))


def test_what_is_no_image_by_digest_is_refused() -> None:
    for image in ("agent-service:latest", "agent-service@sha256:00"):
        arguments: list[str | Path] = [FOLDER / "deploy.sh", "staging", image, FOLDER / "parameters.json"]
        refused = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "is not an image by its digest" in refused.stderr


@pytest.mark.parametrize("name", ["platform", "services"])
def test_no_template_uses_what_cloudformation_cannot_read(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.isascii()
    assert not [token for token in yaml.scan(text) if isinstance(token, yaml.AnchorToken | yaml.AliasToken)]


def test_what_the_services_import_the_platform_exports() -> None:
    def imported(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            if "Fn::ImportValue" in part:
                yield part["Fn::ImportValue"]["Fn::Sub"]
            for value in part.values():
                yield from imported(value)
        elif isinstance(part, list):
            for value in part:
                yield from imported(value)

    exported = {output["Export"]["Name"]["Fn::Sub"] for output in PLATFORM["Outputs"].values() if "Export" in output}
    assert set(imported(SERVICES)) == exported


def test_an_image_is_taken_by_its_digest_only() -> None:
    for each in (PLATFORM, SERVICES):
        pattern = each["Parameters"]["Image"]["AllowedPattern"]
        assert re.search(pattern, f"123456789012.dkr.ecr.eu-west-1.amazonaws.com/agent-service@sha256:{'0a' * 32}")
        for refused in (
            "agent-service",
            "agent-service:latest",
            f"agent-service@sha256:{'0a' * 31}",
            "@sha256:" + "0" * 64,
        ):
            assert not re.search(pattern, refused)
    for role in ROLES:
        assert container(role)["Image"] == {"Ref": "Image"}
    for role in ("api", "worker"):
        assert environment(role)["IMAGE_DIGEST"] == {"Fn::Select": [1, {"Fn::Split": ["@", {"Ref": "Image"}]}]}


def test_secrets_are_given_by_their_versions_and_each_role_may_read_its_own_only() -> None:
    expected = {
        "api": {"DATABASE_URL", "REDIS_URL", "WEBHOOK_SIGNING_KEY"},
        "worker": {"DATABASE_URL", "REDIS_URL", "WEBHOOK_SIGNING_KEY", "OPENAI_API_KEY", "AUDIT_SIGNING_KEY"},
        "migrate": {"DATABASE_URL", "OWNER_DATABASE_URL"},
    }
    arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:agent-service/staging/redis-url-aB3dEf"
    version = ":::0f9c1b52-5f0a-4a42-9d4f-3a2e1c0b7d6e"
    for role, names in expected.items():
        assert set(secrets(role)) == names
        readable = set()
        (statement,) = statements(f"{role.capitalize()}ExecutionRole")
        assert statement["Action"] == "secretsmanager:GetSecretValue"
        for resource in statement["Resource"]:
            found = re.fullmatch(r".*:secret:agent-service/\$\{Environment\}/([a-z-]+)-\?{6}", resource["Fn::Sub"])
            assert found
            readable.add(found[1].replace("-", "_").upper())
        assert readable == names
        for name, reference in secrets(role).items():
            parameter = (PLATFORM if role == "migrate" else SERVICES)["Parameters"][reference["Ref"]]
            assert re.sub(r"(?<!^)([A-Z])", r"_\1", reference["Ref"]).upper() == name
            assert re.search(parameter["AllowedPattern"], arn + version)
            assert not re.search(parameter["AllowedPattern"], arn)
            assert not re.search(parameter["AllowedPattern"], f"{arn}::AWSCURRENT:")


def test_the_parameters_that_are_to_be_filled_in_are_those_of_the_templates() -> None:
    given = {each.partition("=")[0] for each in json.loads((FOLDER / "parameters.json").read_text())}
    wanted = {
        name
        for each in (PLATFORM, SERVICES)
        for name, parameter in each["Parameters"].items()
        if "Default" not in parameter and name not in ("Environment", "Image")
    }
    assert given == wanted


def test_a_task_has_the_time_that_it_takes_to_drain() -> None:
    for role in ("api", "worker"):
        assert float(environment(role)["DRAIN_SECONDS"]) + 2 <= container(role)["StopTimeout"] <= MOST_STOP_SECONDS
    assert container("migrate")["StopTimeout"] <= MOST_STOP_SECONDS


@pytest.mark.parametrize("role", ROLES)
def test_a_task_may_do_little(role: str) -> None:
    only = container(role)
    assert only["Command"] == [role]
    assert "EntryPoint" not in only  # that is the image's
    assert only["User"] == "10001:10001"
    assert only["ReadonlyRootFilesystem"] is True
    assert only["LinuxParameters"]["Capabilities"] == {"Drop": ["ALL"]}
    assert task(role)["NetworkMode"] == "awsvpc"
    assert only["LogConfiguration"]["LogDriver"] == "awslogs"


def test_a_release_that_does_not_become_healthy_goes_back_by_itself() -> None:
    for service in ("Api", "Worker"):
        rolling = RESOURCES[service]["Properties"]["DeploymentConfiguration"]
        assert rolling["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}
        assert rolling["MinimumHealthyPercent"] == 100
        assert "DesiredCount" not in RESOURCES[service]["Properties"]


def test_a_worker_may_protect_itself_and_write_the_audit_and_the_api_may_do_nothing() -> None:
    actions = {action for statement in statements("WorkerTaskRole") for action in as_list(statement["Action"])}
    assert actions == {
        "ecs:GetTaskProtection",
        "ecs:UpdateTaskProtection",
        "s3:GetObject",
        "s3:PutObject",
        "s3:ListBucket",
    }
    assert all(statement["Resource"] != "*" for statement in statements("WorkerTaskRole"))
    assert statements("ApiTaskRole") == []


def test_load_balancers_close_idle_connections_before_the_api_does() -> None:
    source = (ROOT / "app" / "cli" / "service.py").read_text()
    found = re.search(r"timeout_keep_alive=(\d+)", source)
    assert found
    attributes = {
        each["Key"]: each["Value"] for each in RESOURCES["LoadBalancer"]["Properties"]["LoadBalancerAttributes"]
    }
    assert float(attributes["idle_timeout.timeout_seconds"]) < float(found[1])


def test_nobody_reaches_a_worker_or_the_scaler() -> None:
    for group in ("WorkerGroup", "ScalerGroup"):
        assert "SecurityGroupIngress" not in RESOURCES[group]["Properties"]
    (rule,) = RESOURCES["ApiGroup"]["Properties"]["SecurityGroupIngress"]
    assert rule["SourceSecurityGroupId"] == {"Ref": "LoadBalancerGroup"}
    for service in ("Api", "Worker"):
        network = RESOURCES[service]["Properties"]["NetworkConfiguration"]["AwsvpcConfiguration"]
        assert network["AssignPublicIp"] == "DISABLED"


def test_the_scaler_may_resize_the_workers_service_and_nothing_else() -> None:
    allowed = {
        str(action): statement["Resource"]
        for statement in statements("ScalerRole")
        for action in as_list(statement["Action"])
    }
    assert set(allowed) == {
        "secretsmanager:GetSecretValue",
        "ecs:DescribeServices",
        "ecs:UpdateService",
        "cloudwatch:PutMetricData",
        "cloudwatch:GetMetricStatistics",
    }
    assert allowed["ecs:UpdateService"] == {"Ref": "Worker"}
    assert allowed["secretsmanager:GetSecretValue"]["Fn::Sub"].endswith("/scaling-key-??????")


# -- the scaler, as it is in the template, against an API over loopback; of AWS it sees as much as it calls


class Api(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lives = True
        self.desired: list[int] = []
        """Said one after the other; empty: it is away."""


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        status, answer = 503, {}
        if self.path == "/health/live" and self.server.lives:
            status = 200
        if self.path == "/v1/scaling" and self.headers["Authorization"] == "Bearer ask_key" and self.server.desired:
            status, answer = 200, {"desired_workers": self.server.desired.pop(0)}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the library
        """Nothing."""


class Aws(types.ModuleType):
    """Stands for `boto3`, which Lambda has and this environment has not."""

    def __init__(self) -> None:
        super().__init__("boto3")
        self.workers = 1
        self.sizes: list[int] = []
        self.published: list[float] = []
        self.history: list[float] = []
        """What CloudWatch knows of the last minutes."""

    def client(self, name: str) -> "Aws":
        assert name in ("secretsmanager", "cloudwatch", "ecs")
        return self

    def get_secret_value(self, *, SecretId: str, VersionId: str) -> Manifest:
        assert (SecretId, VersionId) == ("arn:aws:secretsmanager:r:1:secret:s-aB3dEf", "v1")
        return {"SecretString": "ask_key"}

    def put_metric_data(self, *, Namespace: str, MetricData: list[Manifest]) -> None:
        (datum,) = MetricData
        assert Namespace == "AgentService"
        assert datum["Dimensions"] == [{"Name": "Environment", "Value": "staging"}]
        self.published.append(datum["Value"])

    def get_metric_statistics(self, *, StartTime: datetime, EndTime: datetime, **more: Any) -> Manifest:
        assert (EndTime - StartTime).total_seconds() == 300
        assert (more["Namespace"], more["MetricName"]) == ("AgentService", "DesiredWorkers")
        assert more["Statistics"] == ["Maximum"]
        return {"Datapoints": [{"Maximum": float(each)} for each in self.history]}

    def describe_services(self, *, cluster: str, services: list[str]) -> Manifest:
        assert (cluster, services) == ("agent-service-staging", ["worker"])
        return {"services": [{"desiredCount": self.workers}]}

    def update_service(self, *, cluster: str, service: str, desiredCount: int) -> None:
        assert (cluster, service) == ("agent-service-staging", "worker")
        self.workers = desiredCount
        self.sizes.append(desiredCount)


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as api:
        threading.Thread(target=api.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield api
        finally:
            api.shutdown()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, api: Api) -> Aws:
    aws = Aws()
    monkeypatch.setitem(sys.modules, "boto3", aws)
    variables = {
        "ENVIRONMENT": "staging",
        "API_URL": f"http://127.0.0.1:{api.server_port}",
        "KEY": "arn:aws:secretsmanager:r:1:secret:s-aB3dEf:::v1",
        "CLUSTER": "agent-service-staging",
        "SERVICE": "worker",
    }
    assert set(variables) == set(RESOURCES["Scaler"]["Properties"]["Environment"]["Variables"])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return aws


@pytest.fixture
def scale(aws: Aws) -> Callable[[], None]:
    """One call of the function, without its pauses."""
    names: dict[str, Any] = {"__name__": "index"}
    exec(compile(RESOURCES["Scaler"]["Properties"]["Code"]["ZipFile"], "index.py", "exec"), names)
    names["SECONDS_BETWEEN"] = 0
    return lambda: names["handler"]({}, None)


def test_workers_come_at_once(api: Api, aws: Aws, scale: Callable[[], None]) -> None:
    api.desired = [1, 7, 7, 9]
    scale()
    assert aws.sizes == [7, 9]
    assert aws.published == [1, 7, 7, 9]


def test_workers_go_when_the_number_was_lower_for_five_minutes(api: Api, aws: Aws, scale: Callable[[], None]) -> None:
    aws.workers = 9
    aws.history, api.desired = [9, 4, 2], [2, 2, 2, 2]
    scale()
    assert aws.sizes == []
    aws.history, api.desired = [4, 2, 2], [2, 2, 2, 2]
    scale()
    assert aws.sizes == [4]


def test_while_the_api_is_away_there_stay_as_many_workers_as_there_are_and_the_function_fails(
    aws: Aws, scale: Callable[[], None]
) -> None:
    aws.workers, aws.history = 6, [2]
    with pytest.raises(HTTPError):
        scale()
    assert (aws.sizes, aws.published) == ([], [])
    alarm = RESOURCES["ScalerFails"]["Properties"]
    assert (alarm["MetricName"], alarm["TreatMissingData"]) == ("Errors", "breaching")


@pytest.mark.parametrize(("role", "port"), [("api", "8000"), ("worker", "8001")])
def test_ecs_ends_only_what_no_longer_lives(role: str, port: str, api: Api) -> None:
    check = container(role)["HealthCheck"]
    assert check["Command"][:3] == ["CMD", "python", "-c"]
    assert check["Timeout"] <= check["Interval"]
    asks = check["Command"][3].replace(f"127.0.0.1:{port}/", f"127.0.0.1:{api.server_port}/")
    assert asks != check["Command"][3]
    exits = [subprocess.run([sys.executable, "-c", asks], stderr=subprocess.DEVNULL, check=False).returncode]
    api.lives = False
    exits += [subprocess.run([sys.executable, "-c", asks], stderr=subprocess.DEVNULL, check=False).returncode]
    assert exits == [0, 1]


def test_the_load_balancer_sends_requests_to_what_is_ready() -> None:
    assert container("api")["PortMappings"] == [{"ContainerPort": 8000}]
    assert RESOURCES["Targets"]["Properties"]["HealthCheckPath"] == "/health/ready"


def test_a_call_of_the_scaler_ends_before_the_next() -> None:
    function = RESOURCES["Scaler"]["Properties"]
    code = function["Code"]["ZipFile"]
    looks, between = (int(re.search(rf"^{name} = (\d+)$", code, re.M)[1]) for name in ("LOOKS", "SECONDS_BETWEEN"))  # type: ignore[index]
    assert (looks - 1) * between + 10 <= function["Timeout"] <= 60
    assert function["ReservedConcurrentExecutions"] == 1
    assert len(code) <= 4096  # all that fits into a template


@pytest.mark.parametrize("role", ["api", "worker", "migrate"])
def test_each_role_has_the_rights_of_no_other(role: str) -> None:
    rights = json.dumps([task(role)["ExecutionRoleArn"], task(role).get("TaskRoleArn")])
    others = {"Api", "Worker", "Migrate"} - {role.capitalize()}
    assert not [other for other in others if other in rights], rights
    assert role.capitalize() in rights
