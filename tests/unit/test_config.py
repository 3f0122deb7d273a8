"""Settings: what is missing or malformed stops the start with one line that names it, and never shows the value."""

import re
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from app.config import Settings, load_settings
from app.domain.errors import ConfigurationError

SECRET = "hunter2"
DATABASE_URL = f"postgresql://agent:{SECRET}@db/agents"
REDIS_URL = f"redis://:{SECRET}@redis/0"
EXAMPLE = Path(__file__).parents[2] / ".env.example"


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process environment in which everything needed is set."""
    monkeypatch.setenv("DATABASE_URL", DATABASE_URL)
    monkeypatch.setenv("REDIS_URL", REDIS_URL)
    return monkeypatch


def test_two_addresses_are_enough(env: pytest.MonkeyPatch) -> None:
    settings = load_settings()
    assert settings.database_url.get_secret_value() == DATABASE_URL
    assert settings.agents == ("app.agents",)
    assert settings.openai_api_key is None


@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL"])
def test_a_missing_variable_is_named(env: pytest.MonkeyPatch, name: str) -> None:
    env.delenv(name)
    with pytest.raises(ConfigurationError, match=f"^{name} is missing: "):
        load_settings()


def test_an_empty_variable_is_a_missing_one(env: pytest.MonkeyPatch) -> None:
    env.setenv("DATABASE_URL", "")
    with pytest.raises(ConfigurationError, match=r"^DATABASE_URL is missing: "):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", f"mysql://agent:{SECRET}@db/agents"),
        ("REDIS_URL", f"http://:{SECRET}@redis"),
        ("OPENAI_BASE_URL", f"{SECRET}.example"),
        ("ENVIRONMENT", SECRET),
        ("LOG_LEVEL", SECRET),
        ("API_PORT", SECRET),
        ("API_PORT", "65536"),
        ("WORKER_CONCURRENCY", "0"),
        ("WORKER_HEALTH_PORT", "-1"),
        ("DRAIN_SECONDS", SECRET),
        ("DRAIN_SECONDS", "nan"),
        ("LEASE_SECONDS", "inf"),
        ("STAND_IN_MODEL_URL", SECRET),
        ("MIN_WORKERS", "-1"),
        ("MAX_WORKERS", "0"),
        ("TARGET_DRAIN_SECONDS", "0"),
        ("EGRESS_TRUSTED_ORIGINS", f"wiki.{SECRET}"),
        ("EGRESS_TRUSTED_ORIGINS", "https://wiki.internal/path"),
        ("EGRESS_TRUSTED_ORIGINS", "http://wiki.internal:65536"),
        ("EGRESS_TRUSTED_ORIGINS", "http://wiki..internal, http://wiki.internal"),
        ("EGRESS_TRUSTED_ORIGINS", "http://127.1"),
    ],
)
def test_a_malformed_variable_is_named_and_not_shown(env: pytest.MonkeyPatch, name: str, value: str) -> None:
    env.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"^{name} is malformed: ") as caught:
        load_settings()
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewest_workers_are_not_more_than_most(env: pytest.MonkeyPatch) -> None:
    env.setenv("MIN_WORKERS", "11")
    with pytest.raises(ConfigurationError, match=r"^MAX_WORKERS is malformed: must not be below MIN_WORKERS$"):
        load_settings()


@pytest.mark.parametrize("environment", ["staging", "Production"])
def test_the_stand_in_model_is_for_development_only(env: pytest.MonkeyPatch, environment: str) -> None:
    env.setenv("STAND_IN_MODEL_URL", "http://model:8080/v1")
    assert load_settings().model_access() == ("stand-in", "http://model:8080/v1")
    env.setenv("ENVIRONMENT", environment)
    with pytest.raises(ConfigurationError, match=r"^ENVIRONMENT is malformed: does not go with STAND_IN_MODEL_URL"):
        load_settings()


def test_a_key_of_the_provider_comes_before_the_stand_in(env: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"^OPENAI_API_KEY is missing: "):
        load_settings().model_access()
    env.setenv("STAND_IN_MODEL_URL", "http://model:8080/v1")
    env.setenv("OPENAI_API_KEY", SECRET)
    assert load_settings().model_access() == (SECRET, None)
    assert not load_settings().is_stand_in


def test_everything_that_is_wrong_is_told_at_once(env: pytest.MonkeyPatch) -> None:
    env.delenv("REDIS_URL")
    env.setenv("API_PORT", "none")
    with pytest.raises(ConfigurationError, match=r"^REDIS_URL is missing: [^\n]*; API_PORT is malformed: [^\n]*$"):
        load_settings()


def test_a_file_in_the_secrets_directory_counts_and_the_environment_wins(
    env: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    env.setenv("SECRETS_DIR", str(tmp_path))
    env.delenv("DATABASE_URL")
    (tmp_path / "database_url").write_text(f"{DATABASE_URL}\n")
    (tmp_path / "redis_url").write_text("redis://from-the-file")
    (tmp_path / "openai_api_key").write_text(SECRET)
    settings = load_settings()
    assert settings.database_url.get_secret_value() == DATABASE_URL
    assert settings.redis_url.get_secret_value() == REDIS_URL
    assert settings.model_access() == (SECRET, None)


def test_secrets_do_not_print(env: pytest.MonkeyPatch) -> None:
    env.setenv("OPENAI_API_KEY", SECRET)
    env.setenv("LANGFUSE_PUBLIC_KEY", "pk-lf-1")
    env.setenv("LANGFUSE_SECRET_KEY", SECRET)
    env.setenv("OTLP_ENDPOINTS", f"https://host/v1/traces authorization={SECRET}")
    settings = load_settings()
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"


def test_agents_are_a_list_separated_by_commas(env: pytest.MonkeyPatch) -> None:
    env.setenv("AGENTS", " app.agents, tests.agents ,")
    assert load_settings().agents == ("app.agents", "tests.agents")


def test_names_of_states_may_be_written_in_capitals(env: pytest.MonkeyPatch) -> None:
    env.setenv("LOG_LEVEL", "WARNING")
    env.setenv("ENVIRONMENT", "Production")
    assert (load_settings().log_level, load_settings().environment) == ("warning", "production")


def test_the_example_has_every_setting_with_its_default() -> None:
    written = dict(re.findall(r"^([A-Z_]+)=(.*)$", EXAMPLE.read_text(), re.MULTILINE))
    assert written == {name.upper(): _default(name) for name in Settings.model_fields}


def _default(name: str) -> str:
    default = Settings.model_fields[name].default
    if default is None or default is PydanticUndefined:
        return ""
    return ",".join(default) if isinstance(default, tuple) else str(default)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATABASE_URL", "postgresql://u:hunter2@localhost:notaport/x"),
        ("DATABASE_URL", "postgresql://u:hunter2@localhost:99999/x"),
        ("REDIS_URL", "redis://:hunter2@localhost:notaport/0"),
        ("REDIS_URL", "redis://:hunter2@localhost:6379/abc"),
    ],
)
def test_a_malformed_address_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://localhost/x")
    monkeypatch.setenv("REDIS_URL", "redis://localhost/0")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=f"^{variable} is malformed: ") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)
