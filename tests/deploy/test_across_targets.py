"""What holds wherever the service runs: the same image, the same commands, the settings of app.config and no others."""

import re
from typing import get_args
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from app.config import DatabaseSettings, Settings
from app.main import create_app
from tests.deploy.targets import TARGETS, expected, workload
from tests.deploy.tools import ROOT
from tests.deploy.workload import IMAGE, Scaler, Workload

SETTINGS = {name.upper(): field for name, field in Settings.model_fields.items()}
SECRETS = {name for name, field in SETTINGS.items() if SecretStr in (field.annotation, *get_args(field.annotation))}
PLATFORMS_OWN = {
    "SECRETS_DIR",
    *("AWS_REGION", "AZURE_CLIENT_ID", "AZURE_STORAGE_ACCOUNT_NAME"),
    *("AWS_LWA_PORT", "AWS_LWA_READINESS_CHECK_PATH", "AWS_LWA_INVOKE_MODE"),
}
"""Not settings: where secrets are; what clients of object stores and Lambda's web adapter are told in the same way."""
NEEDED = {
    "migrate": {name.upper() for name in DatabaseSettings.model_fields},
    "api": {name for name, field in SETTINGS.items() if field.is_required()} | {"WEBHOOK_SIGNING_KEY"},
    "worker": {name for name, field in SETTINGS.items() if field.is_required()}
    | {"WEBHOOK_SIGNING_KEY", "OPENAI_API_KEY", "AUDIT_SIGNING_KEY"},
}
VERSION = (
    r"/versions/(\d+|\$\{\w+_VERSION\})$"
    r"|vault\.azure\.net/secrets/[\w-]+/[0-9a-f]{32}$"
    r"|:::(\$\{\w+Version\}|[\w-]{32,})(\}\})?$"
)
"""Of Google, external-secrets, Azure and AWS."""
LEAVING_SECONDS = 2
"""A drained process has still to end."""
IN_THE_IMAGE = {"API_PORT": 8000, "WORKER_HEALTH_PORT": 8001}


def roles(*, without: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Every role at every target, without roles and kinds of targets that a statement is not about."""
    named = [(target, role) for target, role in expected() if not {role, target.partition("/")[0]} & set(without)]
    return pytest.mark.parametrize(("target", "role"), named)


def targets(*, without: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("target", [name for name in TARGETS if name.partition("/")[0] not in without])


def setting(of: Workload, name: str) -> str:
    """What this process takes for it: as set, or the default."""
    return of.plain.get(name) or str(SETTINGS[name].default)


def port(of: Workload, name: str) -> int:
    return int(of.plain.get(name) or IN_THE_IMAGE[name])


def scaler(target: str) -> Scaler:
    found = TARGETS[target]().scaler
    assert found is not None, f"nothing scales the workers of {target}"
    return found


@roles()
def test_the_command_is_the_same(target: str, role: str) -> None:
    of = workload(target, role)
    assert (of.entry_point, of.arguments) == ((), (role,))


@roles()
def test_the_image_is_ours_by_its_digest(target: str, role: str) -> None:
    """By that of zeros, until a script puts the real one there. That of Lambda is ours and an adapter."""
    assert workload(target, role).image == IMAGE


@roles(without=("migrate",))
def test_a_process_is_told_the_digest_of_the_image_that_it_runs_from(target: str, role: str) -> None:
    of = workload(target, role)
    assert of.plain["IMAGE_DIGEST"] == of.image.rpartition("@")[2]


@roles()
def test_every_variable_is_a_setting(target: str, role: str) -> None:
    of = workload(target, role)
    assert {*of.plain, *of.secret} - PLATFORMS_OWN <= set(SETTINGS)
    assert not set(of.plain) & set(of.secret)


@roles()
def test_a_value_is_one_that_the_setting_takes(target: str, role: str) -> None:
    of = workload(target, role)
    given = {
        name.lower(): value
        for name, value in of.plain.items()
        if name in SETTINGS and value and "${" not in value and name not in SECRETS
    }
    Settings.model_validate({"database_url": "postgresql://host/name", "redis_url": "redis://host", **given})


@roles()
def test_what_is_secret_is_only_ever_a_reference(target: str, role: str) -> None:
    of = workload(target, role)
    assert {name for name in of.plain if name in SECRETS and not is_bare_address(of.plain[name])} == set()
    assert set(of.secret) <= SECRETS
    assert all(of.secret.values())


def is_bare_address(value: str) -> bool:
    """Such as redis://redis:6379/0, where nobody is asked who they are, and which so keeps no secret."""
    url = urlsplit(value)
    return bool(url.scheme and url.hostname) and "@" not in url.netloc and not url.query


@roles(without=("compose",))
def test_a_secret_is_named_by_its_version(target: str, role: str) -> None:
    """So a deployment says what runs, and a new version takes effect with the next one. Files have no versions."""
    for name, reference in workload(target, role).secret.items():
        assert re.search(VERSION, reference), name


@roles()
def test_what_a_role_cannot_do_without_is_there(target: str, role: str) -> None:
    of = workload(target, role)
    assert NEEDED[role] - {*of.plain, *of.secret} == set()


@roles(without=("migrate",))
def test_no_process_that_serves_is_the_owner_of_the_database(target: str, role: str) -> None:
    of = workload(target, role)
    assert "OWNER_DATABASE_URL" not in {*of.plain, *of.secret}


@roles()
def test_a_secret_is_given_to_nobody_who_has_no_use_for_it(target: str, role: str) -> None:
    of = workload(target, role)
    if role == "migrate":
        assert set(of.secret) == NEEDED["migrate"]
    if role == "api":
        assert set(of.secret) <= NEEDED["api"]


@roles(without=("migrate",))
def test_no_stand_in_answers_where_it_is_real(target: str, role: str) -> None:
    of = workload(target, role)
    assert "STAND_IN_MODEL_URL" not in {*of.plain, *of.secret}
    assert of.plain["ENVIRONMENT"] in {"staging", "production"} or "${" in of.plain["ENVIRONMENT"]


@roles(without=("migrate", "lambda"))
def test_there_is_time_to_drain_before_the_kill(target: str, role: str) -> None:
    """Nothing on Lambda is stopped by a signal."""
    of = workload(target, role)
    assert of.grace is not None
    assert of.grace >= float(setting(of, "DRAIN_SECONDS")) + LEAVING_SECONDS


@roles(without=("migrate", "lambda"))
def test_something_looks_whether_it_is_alive(target: str, role: str) -> None:
    """On Lambda the web adapter asks before the first request, and nobody after it."""
    of = workload(target, role)
    assert of.probes or of.has_health_command


@roles(without=("migrate",))
def test_a_probe_asks_for_something_that_is_there(target: str, role: str, paths: dict[str, set[str]]) -> None:
    of = workload(target, role)
    for probe in of.probes:
        assert probe.path in paths[role]
        assert probe.port == port(of, "API_PORT" if role == "api" else "WORKER_HEALTH_PORT")


@pytest.fixture(scope="module")
def paths() -> dict[str, set[str]]:
    """What the API and the worker's health port answer without a key, about their health."""
    api = create_app(Settings(database_url=SecretStr("postgresql://host/name"), redis_url=SecretStr("redis://host")))
    worker = re.findall(r'web\.get\("(/health/[a-z]+)"', (ROOT / "worker" / "health.py").read_text())
    return {"api": {path for path in api.openapi()["paths"] if path.startswith("/health")}, "worker": set(worker)}


@roles(without=("migrate",))
def test_a_port_that_is_opened_is_one_that_is_listened_at(target: str, role: str) -> None:
    of = workload(target, role)
    assert set(of.ports) <= {port(of, "API_PORT" if role == "api" else "WORKER_HEALTH_PORT")}


@roles()
def test_it_runs_as_nobody_in_particular_and_writes_nowhere_that_stays(target: str, role: str) -> None:
    """Where nothing is said, the image's user is taken, which is none that has rights."""
    of = workload(target, role)
    assert of.user in {None, "10001", "10001:10001"}
    assert of.read_only in {None, True}


@targets(without=("lambda",))
def test_the_api_counts_with_what_the_workers_have(target: str) -> None:
    api, worker = workload(target, "api"), workload(target, "worker")
    for name in ("WORKER_CONCURRENCY", "ENVIRONMENT", "IMAGE_DIGEST"):
        assert setting(api, name) == setting(worker, name), name
    for name in ("DATABASE_URL", "REDIS_URL", "WEBHOOK_SIGNING_KEY"):
        assert api.secret.get(name) == worker.secret.get(name), name
        assert api.plain.get(name) == worker.plain.get(name), name


@targets(without=("lambda",))
def test_all_roles_run_the_same_image(target: str) -> None:
    assert len({each.image for each in TARGETS[target]().workloads}) == 1


@targets(without=("compose", "lambda"))
def test_the_scaler_has_the_bounds_that_the_api_was_told(target: str) -> None:
    found, api = scaler(target), workload(target, "api")
    assert str(found.minimum) in {setting(api, "MIN_WORKERS"), "None"}
    assert str(found.maximum) in {setting(api, "MAX_WORKERS"), "None"}


@targets(without=("compose", "lambda"))
def test_the_number_of_workers_is_the_one_that_the_service_asks_for_and_no_other(target: str) -> None:
    found = scaler(target)
    assert found.url.endswith("/v1/scaling")
    assert (found.value, found.per_worker) == ("desired_workers", "1")
    assert not re.search(
        r"redis-lists?|redis-streams?|listName|LLEN|TargetTrackingScaling|ECSServiceAverage|\"cpu\"|\"memory\"",
        found.text,
    )
