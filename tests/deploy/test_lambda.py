"""What deploy/lambda consists of: the API's function behind a URL, and an image with ours and the adapter in it."""

import re
from typing import Any

from app.api.runs import MAX_WAIT_SECONDS
from tests.deploy.cloudformation import read_template
from tests.deploy.tools import ROOT, accepts
from tests.deploy.workload import IMAGE

FOLDER = ROOT / "deploy" / "lambda"


def resource(kind: str) -> dict[str, Any]:
    (found,) = [
        each["Properties"]
        for each in read_template(FOLDER / "template.yaml")["Resources"].values()
        if each["Type"] == kind
    ]
    properties: dict[str, Any] = found
    return properties


def test_cfn_lint_and_hadolint_have_nothing_to_say() -> None:
    accepts("cfn-lint", FOLDER / "template.yaml")
    accepts("hadolint", "--failure-threshold", "style", FOLDER / "Dockerfile")


def test_the_image_is_made_of_images_by_their_digests() -> None:
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert f"ARG IMAGE={IMAGE}\n" in dockerfile
    images = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert len(images) == 2
    assert re.fullmatch(r"\S+aws-lambda-adapter:\S+@sha256:[0-9a-f]{64}", images[0])
    assert images[1] == "${IMAGE}"


def test_a_request_may_take_as_long_as_the_longest_wait() -> None:
    assert resource("AWS::Lambda::Function")["Timeout"] > MAX_WAIT_SECONDS


def test_the_adapter_asks_where_the_api_listens() -> None:
    variables = resource("AWS::Lambda::Function")["Environment"]["Variables"]
    assert variables["AWS_LWA_PORT"] == variables["API_PORT"]
    assert variables["AWS_LWA_READINESS_CHECK_PATH"] == "/health/live", "Postgres may be away while it starts"


def test_secrets_are_given_by_version() -> None:
    variables = resource("AWS::Lambda::Function")["Environment"]["Variables"]
    references = [value for value in variables.values() if "resolve:" in value]
    assert len(references) == 3
    for reference in references:
        assert re.fullmatch(
            r"\{\{resolve:secretsmanager:agent-service/[a-z-]+:SecretString:::\$\{\w+Version\}\}\}", reference
        )


def test_the_platform_asks_callers_for_nothing() -> None:
    assert resource("AWS::Lambda::Url")["AuthType"] == "NONE"
    template = read_template(FOLDER / "template.yaml")["Resources"].values()
    actions = {each["Properties"]["Action"] for each in template if each["Type"] == "AWS::Lambda::Permission"}
    assert actions == {"lambda:InvokeFunctionUrl", "lambda:InvokeFunction"}, "new function URLs need both"
