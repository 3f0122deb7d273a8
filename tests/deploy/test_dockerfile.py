"""The Dockerfile: what hadolint says of it, and what the rest of the project relies on."""

import re
import shlex
from pathlib import Path

import pytest

from app.config import Settings
from tests.deploy.tools import ROOT, accepts

DOCKERFILE = ROOT / "Dockerfile"
ALSO_IN_THE_IMAGE = {"PATH", "HOME", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Each instruction and what follows it, as one line."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest) for name, rest in pairs]


@pytest.fixture(scope="module")
def result(instructions: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the last stage: of the image itself."""
    last = max(number for number, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[last:]


def only(instructions: list[tuple[str, str]], name: str) -> str:
    found = [rest for each, rest in instructions if each == name]
    assert len(found) == 1, f"{len(found)} times {name}"
    return found[0]


def variables(instructions: list[tuple[str, str]]) -> dict[str, str]:
    """What ENV sets."""
    pairs = [pair for name, rest in instructions if name == "ENV" for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


def test_hadolint_has_nothing_to_say() -> None:
    accepts("hadolint", "--failure-threshold", "style", DOCKERFILE)


def test_the_entry_point_is_the_command_line_and_the_api_is_what_it_does_unasked(
    result: list[tuple[str, str]],
) -> None:
    assert only(result, "ENTRYPOINT") == '["agent-service"]'
    assert only(result, "CMD") == '["api"]'


def test_signals_reach_the_process_that_heeds_them(result: list[tuple[str, str]]) -> None:
    assert only(result, "STOPSIGNAL") == "SIGTERM"


def test_the_user_is_a_number_and_not_root(result: list[tuple[str, str]]) -> None:
    """Kubernetes can tell that a number is not root; of a name it cannot."""
    user, _, group = only(result, "USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_what_the_image_sets_is_a_setting_and_no_secret(result: list[tuple[str, str]]) -> None:
    names = set(variables(result)) - ALSO_IN_THE_IMAGE
    assert {name.lower() for name in names} <= set(Settings.model_fields)
    assert not names & {"DATABASE_URL", "REDIS_URL", "IMAGE_DIGEST"}


def test_the_ports_that_it_names_are_those_it_listens_at(result: list[tuple[str, str]]) -> None:
    set_here = variables(result)
    assert only(result, "EXPOSE").split() == [set_here["API_PORT"], set_here["WORKER_HEALTH_PORT"]]
    assert set_here["API_HOST"] == "0.0.0.0"  # who is in the container only would be nobody


def test_packages_are_installed_from_the_lock_with_their_hashes(instructions: list[tuple[str, str]]) -> None:
    installing = [rest for name, rest in instructions if name == "RUN" and " install " in rest and "pip" in rest]
    assert installing
    for command in installing:
        assert "--require-hashes" in command
        assert "--requirement requirements.lock" in command


def test_no_layer_of_the_result_has_build_tools(result: list[tuple[str, str]]) -> None:
    assert not [rest for name, rest in result if name == "RUN" and re.search(r"\b(apt|apt-get|pip|uv|gcc)\b", rest)]


def test_no_secret_is_an_argument_of_the_build(instructions: list[tuple[str, str]]) -> None:
    """The value of an argument is seen in the image's history."""
    given = {rest.partition("=")[0] for name, rest in instructions if name == "ARG"}
    assert given == {"PYTHON", "GIT_REVISION"}


def test_every_stage_begins_with_the_same_python(instructions: list[tuple[str, str]]) -> None:
    assert {rest.split()[0] for name, rest in instructions if name == "FROM"} == {"${PYTHON}"}


def test_only_what_is_named_gets_into_the_build(instructions: list[tuple[str, str]]) -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {
        source
        for name, rest in instructions
        if name == "COPY" and "--from=" not in rest
        for source in rest.split()[:-1]
    }
    assert {Path(source).parts[0] for source in let_in} == {Path(source).parts[0] for source in copied}
