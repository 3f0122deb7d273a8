"""deploy.sh and promote.sh of deploy/cloudrun, run against a stand-in of Google Cloud and a real API."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from app.devstack.access import make_key
from app.devstack.stack import Api
from app.domain.principal import Scope
from tests.deploy.cloudrun_programs import SITE_PACKAGES, STATE, TOKEN
from tests.deploy.cloudrun_stand_in import Google, real_gcloud
from tests.deploy.test_cloudrun import DIGEST, FOLDER, IMAGE, VALUES
from tests.stack import Stack

REPOSITORY = IMAGE.partition("@")[0]
OTHER = f"{REPOSITORY}@sha256:{'5e' * 32}"
Promote = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def _api(servers: Stack) -> Iterator[Api]:
    api = servers.another_api("staging-api", IMAGE_DIGEST=DIGEST, ENVIRONMENT="staging")
    api.start()
    yield api
    api.stop()


@pytest.fixture
def google(_api: Api, tmp_path: Path) -> Google:
    return Google(tmp_path, _api.address)


@pytest.fixture
def env(google: Google, stack: Stack, tenant: str) -> Iterator[dict[str, str]]:
    """Of the scripts."""
    key = make_key(stack.database_url, tenant=tenant, name="smoke", scopes=[Scope.RUNS_READ, Scope.RUNS_WRITE])
    ours = {
        name: value for name, value in VALUES.items() if name not in {"IMAGE", "ENVIRONMENT", "CANDIDATE", "SERVING"}
    }
    with google.monitoring() as monitoring:
        yield {
            **ours,
            "PATH": f"{google.bin}:{os.environ['PATH']}",
            STATE: str(google.directory),
            SITE_PACKAGES: str(Path(yaml.__file__).parents[1]),
            "AGENT_SERVICE_KEY": key,
            "COSIGN_KEY": "gcpkms://signing-key",
            "GATE_SECONDS": "0.1",
            "MONITORING_URL": monitoring,
        }


@pytest.fixture
def run(env: dict[str, str]) -> Promote:
    def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(FOLDER / f"{script}.sh"), *arguments]
        return subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.fixture
def promote(run: Promote) -> Promote:
    def promote(image: str = IMAGE, environment: str = "staging", **variables: str) -> subprocess.CompletedProcess[str]:
        return run("promote", environment, image, **variables)

    return promote


@pytest.fixture
def served(google: Google) -> tuple[str, str]:
    """A release is in service: its revisions of the API and of the workers."""
    before = "agent-service-api-before", "agent-service-worker-before"
    google.serves(*before)
    return before


def steps(google: Google) -> list[str]:
    """What was done, without what was only asked."""
    named = {
        "cosign": "verify",
        "jobs replace": "set migration",
        "jobs execute": "migrate",
        "services replace": "candidate",
        "worker-pools replace": "candidate workers",
        "services update-traffic": "traffic",
        "update-instance-split": "workers",
    }
    found = []
    for call in google.calls:
        text = " ".join(call)
        for words, name in named.items():
            if words in text:
                shares = re.findall(r"(?<==)\d+(?=,|$| )", text.partition("--to-revisions=")[2].split(" ")[0])
                found.append(" ".join([name, *shares]))
    return found


def test_a_release_comes_into_service_step_by_step(google: Google, promote: Promote, served: tuple[str, str]) -> None:
    done = promote()
    assert done.returncode == 0, done.stderr
    assert steps(google) == [
        "verify",
        "set migration",
        "migrate",
        "candidate",
        "candidate workers",
        "traffic 10 90",
        "workers 10 90",
        "traffic 50 50",
        "workers 50 50",
        "traffic 100",
        "workers 100",
    ]
    for kind, before in zip(("services", "worker-pools"), served, strict=True):
        ((revision, share),) = google.shares(kind).items()
        assert (revision != before, share) == (True, 100)
    assert done.stderr.count("smoke test of") == 5
    (migrated,) = google.called("jobs", "execute")
    assert "--wait" in migrated
    assert f"staging runs {DIGEST}" in done.stderr


def test_no_traffic_goes_to_a_candidate_before_its_smoke_test(
    google: Google, promote: Promote, served: tuple[str, str]
) -> None:
    said = promote().stderr
    assert said.index("migrating") < said.index("without traffic beside") < said.index("smoke test of")
    assert said.index("smoke test of") < said.index("giving 10 %")


def test_what_is_deployed_keeps_the_traffic_and_the_workers_where_they_are(
    google: Google, run: Promote, served: tuple[str, str]
) -> None:
    done = run("deploy", "staging", IMAGE)
    assert done.returncode == 0, done.stderr
    assert google.shares("services") == {served[0]: 100}
    assert google.shares("worker-pools") == {served[1]: 100}
    facts = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (facts["serving_api"], facts["serving_worker"]) == served
    assert facts["candidate_url"] == facts["url"] == google.url
    service = google.runs("services")
    assert service is not None
    assert service["spec"]["template"]["metadata"]["name"] == facts["candidate_api"]
    assert service["spec"]["template"]["spec"]["containers"][0]["image"] == IMAGE


def test_a_deployment_keeps_the_number_of_workers_that_crema_has_set(
    google: Google, run: Promote, served: tuple[str, str]
) -> None:
    pool = google.directory / "worker-pools.json"
    pool.write_text(pool.read_text().replace('manualInstanceCount": "1"', 'manualInstanceCount": "6"'))
    assert run("deploy", "staging", IMAGE).returncode == 0
    assert 'manualInstanceCount: "6"' in google.manifests[-1].read_text()


def test_the_first_release_has_all_from_the_beginning(google: Google, promote: Promote) -> None:
    done = promote()
    assert done.returncode == 0, done.stderr
    assert steps(google)[-2:] == ["traffic 100", "workers 100"]
    assert "the first deployment" not in done.stderr
    assert list(google.shares("services").values()) == [100]


@pytest.mark.parametrize("image", [f"{REPOSITORY}:1.4.0", REPOSITORY, IMAGE[:-1], f"{REPOSITORY}:1.4.0@sha256:short"])
def test_a_tag_is_refused(google: Google, promote: Promote, run: Promote, image: str) -> None:
    for done in (promote(image), run("deploy", "staging", image)):
        assert done.returncode == 2
        assert "does not name an image by its digest" in done.stderr
    assert google.calls == []


def test_an_unsigned_image_is_refused(google: Google, promote: Promote, served: tuple[str, str]) -> None:
    google.fails("cosign verify")
    done = promote()
    assert done.returncode == 2
    assert "is not signed as it must be: cosign: the stand-in was told to fail" in done.stderr
    assert steps(google) == ["verify"]
    assert google.calls == [["cosign", "verify", "--key", "gcpkms://signing-key", IMAGE]]


def test_a_signature_without_a_key_must_be_of_somebody(google: Google, run: Promote) -> None:
    identity = r"^https://github\.com/OWNER/agent-service/\.github/workflows/release\.yml@refs/tags/v.*$"
    assert run("deploy", "staging", IMAGE, COSIGN_KEY="", COSIGN_IDENTITY=identity).returncode == 0
    (call,) = google.called("cosign")
    assert call[2:6] == [
        *("--certificate-identity-regexp", identity),
        *("--certificate-oidc-issuer", "https://token.actions.githubusercontent.com"),
    ]
    refused = run("deploy", "staging", IMAGE, COSIGN_KEY="", COSIGN_IDENTITY="")
    assert refused.returncode == 2
    assert "whose signature" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "usage:"),
        (("staging",), "usage:"),
        (("development", IMAGE), "development is neither staging nor production"),
        (("staging", IMAGE, "now"), "usage:"),
    ],
)
def test_wrong_usage_changes_nothing(google: Google, run: Promote, arguments: tuple[str, ...], said: str) -> None:
    for script in ("promote", "deploy"):
        done = run(script, *arguments)
        assert done.returncode == 2
        assert said in done.stderr
    assert google.calls == []


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("PROJECT_ID", "PROJECT_ID is not set"),
        ("NETWORK", "NETWORK is not set"),
        ("AGENT_SERVICE_KEY", "AGENT_SERVICE_KEY is not set"),
    ],
)
def test_what_is_not_set_is_said_before_anything_is_changed(
    google: Google, promote: Promote, missing: str, said: str
) -> None:
    done = promote(**{missing: ""})
    assert done.returncode == 2
    assert said in done.stderr
    assert google.manifests == []


def test_a_migration_that_fails_ends_it_all(google: Google, promote: Promote, served: tuple[str, str]) -> None:
    google.fails("jobs execute")
    done = promote()
    assert done.returncode == 1
    assert steps(google) == ["verify", "set migration", "migrate"]
    assert google.shares("services") == {served[0]: 100}


@pytest.mark.parametrize("question", ["services list", "worker-pools list"])
def test_without_an_answer_from_google_nobody_takes_it_for_the_first_deployment(
    google: Google, promote: Promote, served: tuple[str, str], question: str
) -> None:
    google.fails(question)
    done = promote()
    assert done.returncode == 1
    assert "gcloud does not say what runs" in done.stderr
    assert steps(google) == ["verify"]


def test_a_failing_smoke_test_leaves_the_traffic_where_it_is(
    google: Google, promote: Promote, served: tuple[str, str]
) -> None:
    done = promote(f"{REPOSITORY}@sha256:{'6f' * 32}", SMOKE_SECONDS="5")
    assert done.returncode == 1
    assert f"FAILED: sha256:{'6f' * 32} has had no traffic, {served[0]} serves on" in done.stderr
    assert steps(google)[-1] == "candidate workers"
    assert google.shares("services") == {served[0]: 100}
    assert google.shares("worker-pools") == {served[1]: 100}


def test_a_key_that_is_not_known_fails_the_smoke_test(
    google: Google, promote: Promote, served: tuple[str, str]
) -> None:
    assert promote(AGENT_SERVICE_KEY="as_unknown_unknown").returncode == 1
    assert google.shares("services") == {served[0]: 100}


@pytest.mark.parametrize(
    ("share", "answers"),
    [(10, {"2xx": 1, "5xx": 3}), (50, {"2xx": 980, "4xx": 5, "5xx": 20}), (100, {"2xx": 80, "5xx": 20})],
)
def test_too_many_errors_at_a_step_go_back(
    google: Google, promote: Promote, served: tuple[str, str], share: int, answers: dict[str, int]
) -> None:
    google.answers[share] = answers
    done = promote()
    assert done.returncode == 1
    requests, failures = sum(answers.values()), answers["5xx"]
    assert f"too many: {failures} of {requests} requests failed" in done.stderr
    assert f"back: {served[0]} serves all" in done.stderr
    assert steps(google)[-2:] == ["traffic 100", "workers 100"]
    assert f"giving {share} %" in done.stderr
    assert google.shares("services") == {served[0]: 100}
    assert google.shares("worker-pools") == {served[1]: 100}


def test_few_errors_and_few_requests_pass_and_it_is_said(
    google: Google, promote: Promote, served: tuple[str, str]
) -> None:
    google.answers = {10: {"2xx": 5, "5xx": 1}, 50: {"2xx": 995, "5xx": 5}, 100: {}}
    done = promote()
    assert done.returncode == 0, done.stderr
    assert "too few to judge, fewer than 20" in done.stderr
    assert "good: 5 of 1000 requests failed" in done.stderr
    (newest,) = google.shares("services")
    for query in google.queries:
        assert f'resource.labels.revision_name = "{newest}"' in query["filter"][0]


def test_without_an_answer_from_cloud_monitoring_there_is_no_judgement_and_no_release(
    google: Google, promote: Promote, served: tuple[str, str]
) -> None:
    done = promote(MONITORING_URL="http://127.0.0.1:1")
    assert done.returncode == 1
    assert "no judgement" in done.stderr
    assert google.shares("services") == {served[0]: 100}


def test_a_step_that_google_refuses_goes_back(google: Google, promote: Promote, served: tuple[str, str]) -> None:
    google.fails("=50,")
    done = promote()
    assert done.returncode == 1
    assert google.shares("services") == {served[0]: 100}
    assert google.shares("worker-pools") == {served[1]: 100}


def test_where_going_back_fails_it_is_said_and_the_other_half_goes_back_all_the_same(
    google: Google, promote: Promote, served: tuple[str, str]
) -> None:
    google.answers[10] = {"5xx": 30}
    google.fails(f"--to-revisions={served[0]}=100")
    done = promote()
    assert done.returncode == 1
    assert "NOT BACK" in done.stderr
    assert google.shares("worker-pools") == {served[1]: 100}


def test_a_service_that_is_split_already_is_left_alone(
    google: Google, promote: Promote, served: tuple[str, str]
) -> None:
    google.set_shares("services", {served[0]: 60, "another": 40})
    done = promote()
    assert done.returncode == 1
    assert "is split between revisions" in done.stderr
    assert steps(google) == ["verify"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_promotion_goes_back(
    google: Google, env: dict[str, str], served: tuple[str, str], number: signal.Signals, code: int
) -> None:
    """In the middle of a look at the errors, which takes minutes."""
    command = [str(FOLDER / "promote.sh"), "staging", IMAGE]
    process = subprocess.Popen(
        command, env=env | {"GATE_SECONDS": "300"}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _until(lambda: google.called("print-access-token") and len(google.shares("services")) == 2)
    time.sleep(0.3)
    began = time.monotonic()
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == code
    assert "interrupted" in said
    assert f"back: {served[0]} serves all" in said
    assert google.shares("services") == {served[0]: 100}
    assert google.shares("worker-pools") == {served[1]: 100}


def test_a_second_ctrl_c_does_not_stop_the_way_back(
    google: Google, env: dict[str, str], served: tuple[str, str]
) -> None:
    google.waits(f"--to-revisions={served[0]}=100")
    command = [str(FOLDER / "promote.sh"), "staging", IMAGE]
    process = subprocess.Popen(
        command, env=env | {"GATE_SECONDS": "300"}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _until(lambda: google.called("print-access-token"))
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _until((google.directory / "waiting").exists)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"back: {served[0]} serves all" in said
    assert google.shares("services") == {served[0]: 100}


def test_production_takes_what_staging_runs(google: Google, promote: Promote, servers: Stack, stack: Stack) -> None:
    staging, production = google.url, servers.another_api("production", IMAGE_DIGEST=DIGEST, ENVIRONMENT="production")
    production.start()
    try:
        (google.directory / "url").write_text(production.address)
        done = promote(environment="production", STAGING_URL=staging)
        assert done.returncode == 0, done.stderr
        assert f"production runs {DIGEST}" in done.stderr
        service = google.runs("services")
        assert service is not None
        variables = {
            each["name"]: each.get("value") for each in service["spec"]["template"]["spec"]["containers"][0]["env"]
        }
        assert (variables["ENVIRONMENT"], variables["IMAGE_DIGEST"]) == ("production", DIGEST)

        (google.directory / "calls").unlink()
        refused = promote(environment="production", STAGING_URL=production.address)
        assert (refused.returncode, google.calls) == (2, [])
        assert f"shows {DIGEST} in production" in refused.stderr
    finally:
        production.stop()


@pytest.mark.parametrize(
    ("staging", "said"), [("", "STAGING_URL is not set"), ("http://127.0.0.1:1", "staging does not say what it runs")]
)
def test_production_takes_nothing_that_staging_does_not_show(
    google: Google, promote: Promote, staging: str, said: str
) -> None:
    for done, why in (
        (promote(environment="production", STAGING_URL=staging), said),
        (promote(OTHER, "production", STAGING_URL=google.url), "first"),
    ):
        assert done.returncode == 2
        assert why in done.stderr
    assert google.calls == []


def test_no_secret_is_said_or_handed_to_a_command_line(
    google: Google, promote: Promote, env: dict[str, str], served: tuple[str, str]
) -> None:
    done = promote()
    for secret in (env["AGENT_SERVICE_KEY"], TOKEN):
        assert secret not in done.stderr + done.stdout
        assert secret not in str(google.calls)


def test_crema_gets_its_configuration_once(google: Google, run: Promote, served: tuple[str, str]) -> None:
    done = run("scaler", "staging")
    assert done.returncode == 0, done.stderr
    (created,) = google.called("parametermanager", "create")
    version = created[created.index("create") + 1]
    service = yaml.safe_load(google.manifests[-1].read_text())
    (config,) = [
        each["value"]
        for each in service["spec"]["template"]["spec"]["containers"][0]["env"]
        if each["name"] == "CREMA_CONFIG"
    ]
    assert config == (f"projects/some-project/locations/global/parameters/agent-service-crema/versions/{version}")
    (google.directory / "versions").write_text(config)
    assert run("scaler", "staging").returncode == 0
    assert len(google.called("parametermanager", "create")) == 1


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_understands_every_command_of_the_scripts(
    google: Google, run: Promote, promote: Promote, served: tuple[str, str], tmp_path: Path
) -> None:
    assert promote().returncode == 0
    assert run("scaler", "staging").returncode == 0
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text("{}")
    calls = [
        [re.sub(rf"{tempfile.gettempdir()}/.*\.yaml$", str(manifest), word) for word in call]
        for call in google.calls
        if call[0] == "gcloud"
    ]
    calls = [[re.sub(rf"=/.*{manifest.name}$", f"={manifest}", word) for word in call] for call in calls]
    shapes = {re.sub(r"[0-9a-f]{8}-\d{14}|=\d+", "", " ".join(call)): call for call in calls}
    assert len(shapes) >= 11
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda call: (call, real_gcloud(call[1:], tmp_path)), shapes.values()))
    refused = {shlex.join(call): done.stderr for call, done in results if done.returncode != 1}
    assert not refused, refused


def _until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "not within 20 s"
        time.sleep(0.05)
