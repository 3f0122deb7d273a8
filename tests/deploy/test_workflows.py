"""The workflows: pinned, with the least rights, one build, and one digest from the build to production."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import ROOT, accepts

WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
BUILDS = re.compile(r"docker(?: buildx)? build\b|docker compose build|build-push-action|buildah|kaniko|gcloud builds")
LITERAL = re.compile(r"\$\{\{.*?\}\}", re.DOTALL)
WRITES = {"release.yml": {"packages", "id-token"}, "deploy.yml": {"id-token"}}
"""What a workflow may write: its image and signature, and who it says to be."""
BUILT = "${{ steps.build.outputs.image }}"


def read(name: str) -> dict[str, Any]:
    """A workflow. YAML takes the key `on` for true."""
    workflow: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
    workflow["on"] = workflow.pop(True)
    return workflow


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job.get("steps", [])


def each() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def test_they_are_what_we_speak_of() -> None:
    assert {path.name for path in WORKFLOWS} == {"ci.yml", "release.yml", "deploy.yml"}


def test_their_form_is_right() -> None:
    accepts("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)


def test_dependabot_is_told_in_the_right_form_to_renew_the_pins() -> None:
    path = ROOT / ".github" / "dependabot.yml"
    accepts("check-jsonschema", "--builtin-schema", "vendor.dependabot", path)
    told = yaml.safe_load(path.read_text())
    assert "github-actions" in {update["package-ecosystem"] for update in told["updates"]}


def test_zizmor_finds_nothing() -> None:
    accepts("zizmor", "--offline", "--no-progress", "--min-severity", "informational", ROOT / ".github")


@each()
def test_shellcheck_has_nothing_to_say_of_the_commands(path: Path) -> None:
    for step in steps(read(path.name)):
        if "run" in step:
            accepts("shellcheck", "--shell", "bash", "-", given=step["run"])


@each()
def test_an_action_of_others_is_named_by_its_commit_and_its_version(path: Path) -> None:
    for line in path.read_text().splitlines():
        if match := re.search(r"uses: *(.*)", line):
            assert re.fullmatch(r"(\./\S+|[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+)", match[1]), line


def test_an_action_is_the_same_everywhere() -> None:
    used: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for name, commit in re.findall(r"uses: *([\w./-]+)@(.*)", path.read_text()):
            used.setdefault(name, set()).add(commit)
    assert {name: commits for name, commits in used.items() if len(commits) > 1} == {}


@each()
def test_rights_are_given_to_each_job_and_only_what_it_needs(path: Path) -> None:
    workflow = read(path.name)
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        writes = {right for right, level in job["permissions"].items() if level != "read"}
        assert writes <= WRITES.get(path.name, set())


@each()
def test_no_token_stays_in_the_working_copy(path: Path) -> None:
    for step in steps(read(path.name)):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@each()
def test_nothing_from_outside_is_pasted_into_a_command(path: Path) -> None:
    """An expression is put into the script before the shell reads it; a variable is not."""
    for step in steps(read(path.name)):
        assert not LITERAL.search(step.get("run", "")), step


@each()
def test_no_long_lived_secret_is_kept_by_github(path: Path) -> None:
    """Who we are is said by OIDC; the token of the run ends with it."""
    assert not re.search(r"\bsecrets\.|secrets: inherit|credentials_json|service_account_key", path.read_text())


@each()
def test_every_job_ends_some_time(path: Path) -> None:
    for name, job in read(path.name)["jobs"].items():
        assert "uses" in job or "timeout-minutes" in job, name


def test_what_has_to_pass_is_all_of_it() -> None:
    make = read("ci.yml")["jobs"]["make"]
    targets = {each["target"] for each in make["strategy"]["matrix"]["include"]}
    assert targets == {"check", "test", "test-phoenix", "verify-deploy", "test-containers"}
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}"
    assert [step["run"] for step in make["steps"] if "run" in step] == ['make "$TARGET"']


def test_a_change_from_outside_starts_nothing_that_may_write() -> None:
    assert set(read("ci.yml")["on"]) == {"pull_request", "workflow_call"}
    assert read("release.yml")["on"] == {"push": {"branches": ["main"]}}
    assert set(read("deploy.yml")["on"]) == {"workflow_call", "workflow_dispatch"}


def test_nothing_is_released_before_everything_has_passed() -> None:
    jobs = read("release.yml")["jobs"]
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert jobs["image"]["needs"] == "ci"


def test_production_comes_after_staging_and_after_its_reviewers() -> None:
    """Who they are is a setting of the environment, which the job has to name."""
    jobs = read("release.yml")["jobs"]
    assert jobs["staging"]["needs"] == "image"
    assert jobs["production"]["needs"] == ["image", "staging"]
    for environment in ("staging", "production"):
        assert jobs[environment]["uses"] == "./.github/workflows/deploy.yml"
        assert jobs[environment]["with"]["environment"] == environment
        assert "if" not in jobs[environment]
    assert read("deploy.yml")["jobs"]["deploy"]["environment"] == "${{ inputs.environment }}"


def test_the_image_is_built_exactly_once() -> None:
    built = {path.name: len(BUILDS.findall("\n".join(said(read(path.name))))) for path in WORKFLOWS}
    assert built == {"ci.yml": 0, "release.yml": 1, "deploy.yml": 0}


def said(workflow: dict[str, Any]) -> list[str]:
    return [step.get("run", "") + step.get("uses", "") for step in steps(workflow)]


def test_it_is_scanned_before_it_is_signed_and_signed_before_it_is_deployed() -> None:
    release = said(read("release.yml"))
    order = [
        next(number for number, step in enumerate(release) if mark in step)
        for mark in ("make audit-deps", "make sbom", "docker buildx build", "scan-action", "cosign sign")
    ]
    assert order == sorted(order)
    scan = release[order[3]]
    step = next(step for step in steps(read("release.yml")) if step.get("uses") == scan)
    assert step["with"]["fail-build"] is True
    signing = release[order[4]]
    assert re.search(r"cosign attest .*--type cyclonedx .*--predicate dist/sbom\.json", signing)


def test_the_image_knows_the_commit_that_it_is_built_from() -> None:
    assert '--build-arg "GIT_REVISION=$GITHUB_SHA"' in "\n".join(said(read("release.yml")))


def test_what_is_signed_and_deployed_is_the_digest_that_was_built() -> None:
    jobs = read("release.yml")["jobs"]
    build = next(step for step in jobs["image"]["steps"] if step.get("id") == "build")
    assert '"image=$repository@$digest"' in build["run"]
    assert jobs["image"]["outputs"] == {"image": BUILT}
    for step in jobs["image"]["steps"][jobs["image"]["steps"].index(build) + 1 :]:
        assert BUILT in {**step.get("env", {}), **step.get("with", {})}.values()
    for environment in ("staging", "production"):
        assert jobs[environment]["with"]["image"] == "${{ needs.image.outputs.image }}"


def test_a_deployment_keeps_the_digest_and_is_left_to_the_script_that_verifies_it() -> None:
    job = read("deploy.yml")["jobs"]["deploy"]
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    assert job["env"]["SOURCE"] == "${{ inputs.image }}"
    assert 'cosign copy "$SOURCE" "$REPOSITORY:${SOURCE##*:}"' in commands
    assert 'deploy/cloudrun/promote.sh "$TARGET" "$REPOSITORY@${SOURCE##*@}"' in commands
    assert (ROOT / "deploy" / "cloudrun" / "promote.sh").stat().st_mode & 0o111


@pytest.mark.parametrize("source", ["ghcr.io/example/agent-service:main", "ghcr.io/example/agent-service", ""])
def test_a_deployment_takes_nothing_but_a_digest(source: str) -> None:
    copying = next(step for step in steps(read("deploy.yml")) if "cosign copy" in step.get("run", ""))
    env = {"SOURCE": source, "PATH": "/nowhere"}
    done = subprocess.run(["/bin/bash", "-ec", copying["run"]], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")


def test_only_what_main_has_signed_is_deployed() -> None:
    job = read("deploy.yml")["jobs"]["deploy"]
    said_by = job["env"]["COSIGN_IDENTITY"].replace("${{ github.repository }}", "example/agent-service")
    workflow = "https://github.com/example/agent-service/.github/workflows/release.yml"
    assert re.search(said_by, f"{workflow}@refs/heads/main")
    for other in (f"{workflow}@refs/heads/mine", f"{workflow}@refs/heads/main2", f"https://example.com/{workflow}"):
        assert not re.search(said_by, other)
    assert "COSIGN_KEY" not in job["env"]


def test_a_deployment_is_told_what_the_environment_files_leave_open() -> None:
    env = read("deploy.yml")["jobs"]["deploy"]["env"]
    lines = (ROOT / "deploy" / "cloudrun" / "production.env").read_text().splitlines()
    open_there = {line.rstrip("=") for line in lines if re.fullmatch(r"[A-Z_]+=", line)}
    elsewhere = {"COSIGN_KEY", "CREMA_DIGEST"}  # another way of signing; scaler.sh, which is run by hand
    assert open_there - elsewhere <= set(env)


def test_two_deployments_to_one_place_do_not_meet() -> None:
    assert read("deploy.yml")["concurrency"] == {
        "group": "deploy-${{ inputs.environment }}",
        "cancel-in-progress": False,
    }
