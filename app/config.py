"""Settings: every environment variable of the service, in one place.

Each is also readable from a file of the same name (lower case) in `SECRETS_DIR` (default `/run/secrets`).
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.domain.build import Build
from app.domain.egress import read_origins
from app.domain.errors import ConfigurationError, EgressRefused
from app.domain.otlp import OtlpEndpoint, basic, check_url, read_otlp_endpoints
from app.domain.scaling import ScalingRules
from app.redaction import check_pattern

DEFAULT_SECRETS_DIR = "/run/secrets"
MIN_SIGNING_KEY = 32
"""Characters."""


class DatabaseSettings(BaseSettings):
    """What a command that only works on the database has to be told."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True, env_ignore_empty=True)

    database_url: SecretStr = Field(description="PostgreSQL: postgresql://user:password@host:5432/name")
    owner_database_url: SecretStr | None = Field(
        None, description="The same database as its owner, for commands that the service's own user may not do."
    )

    @property
    def owner_url(self) -> str:
        """For migrations and erasure: the owner's address, or the service's where there is no other."""
        return (self.owner_database_url or self.database_url).get_secret_value()

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never be seen: every secret, and the passwords inside of addresses."""
        values = [value.get_secret_value() for _, value in self if isinstance(value, SecretStr)]
        passwords = [password for value in values if (password := _password_in(value))]
        return (*values, *passwords, *map(unquote, passwords))

    @property
    def database_user(self) -> str:
        """Whom the service logs in as."""
        return unquote(urlsplit(self.database_url.get_secret_value()).username or "")

    @field_validator("database_url", "owner_database_url")
    @classmethod
    def _is_postgres(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("must start with postgresql://")
        _check_port(value)
        return value


class AuditSettings(DatabaseSettings):
    """What commands about the audit have to be told."""

    audit_signing_key: SecretStr | None = Field(
        None, description="Ed25519 private key (PEM) that signs the audit's checkpoints; unset: it is not sealed."
    )
    audit_anchor: str = Field(
        "audit-checkpoints.jsonl", description="Where checkpoints go: a file, or s3://, gs:// or az:// bucket and path."
    )


class Settings(AuditSettings):
    """What the API and the worker are told. Never changes after the start; secrets never print."""

    redis_url: SecretStr = Field(description="Redis or Valkey: redis://[:password@]host:6379/0")
    agents: Annotated[tuple[str, ...], NoDecode] = Field(
        ("app.agents",), description="Packages whose modules define agents, separated by commas."
    )

    webhook_signing_key: SecretStr | None = Field(
        None, description="Secret from which each webhook's own is derived; unset: there are no webhooks."
    )
    egress_trusted_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins (http://wiki.internal:8080), separated by commas, that tools and webhooks may reach"
        " although they are private or not https.",
    )

    openai_api_key: SecretStr | None = Field(None, description="Key of the model provider. The worker needs it.")
    openai_base_url: str | None = Field(None, description="Any OpenAI-compatible address; empty means OpenAI itself.")
    model: str | None = Field(None, description="Asked instead of every agent's own model.")
    stand_in_model_url: str | None = Field(
        None, description="Stand-in model that answers while there is no OPENAI_API_KEY; in development only."
    )

    langfuse_public_key: str | None = Field(None, description="Langfuse project key; unset: no traces to Langfuse.")
    langfuse_secret_key: SecretStr | None = Field(None, description="Langfuse secret key.", validate_default=True)
    langfuse_host: str = Field("https://cloud.langfuse.com", description="Langfuse server.")
    phoenix_collector_endpoint: str | None = Field(None, description="Phoenix server; unset: no traces to Phoenix.")
    phoenix_api_key: SecretStr | None = Field(None, description="Phoenix API key, where it wants one.")
    langsmith_api_key: SecretStr | None = Field(None, description="LangSmith API key; unset: no traces to LangSmith.")
    langsmith_endpoint: str = Field("https://api.smith.langchain.com", description="LangSmith server.")
    langsmith_project: str = Field("agent-service", description="LangSmith project.")
    dd_api_key: SecretStr | None = Field(None, description="Datadog API key; unset: no traces to Datadog.")
    dd_site: str = Field("datadoghq.com", description="Datadog site.")
    dd_otlp_endpoint: str | None = Field(None, description="Datadog's receiver of OTLP traces; unset: the site's.")
    otlp_endpoints: SecretStr | None = Field(
        None, description="Further OTLP receivers of traces: 'https://host/v1/traces name=value …; https://other/…'."
    )
    trace_urls: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict,
        description="Where people find a trace, by back end: addresses with {trace_id} or {run_id}.",
    )
    redact_patterns: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Regular expressions (a JSON list) of what traces and logs must not show."
    )

    environment: Literal["development", "staging", "production"] = Field(
        "development", description="Shown in traces and by /version."
    )
    image_digest: str = Field("", description="Digest of the running image, shown by /version and kept on every run.")
    git_revision: str = Field("", description="Commit that the image was built from, shown and kept likewise.")

    api_host: str = Field("127.0.0.1", description="Address that the API and the worker's health port bind.")
    api_port: int = Field(8000, ge=1, le=65535, description="Port of the API.")
    worker_concurrency: int = Field(100, ge=1, le=10_000, description="Runs that one worker executes at a time.")
    worker_health_port: int = Field(
        0, ge=0, le=65535, description="Port of the worker's health probe and metrics; 0: none."
    )
    min_workers: int = Field(1, ge=0, le=10_000, description="Fewest workers that are asked for.")
    max_workers: int = Field(10, ge=1, le=10_000, description="Most workers that are asked for.", validate_default=True)
    target_drain_seconds: float = Field(
        30, gt=0, le=86_400, description="Seconds in which what is queued should have been taken by workers."
    )
    drain_seconds: float = Field(8, gt=0, le=3600, description="Seconds after SIGTERM until open runs are handed back.")
    lease_seconds: float = Field(20, ge=1, le=600, description="Seconds until a silent worker's runs are taken over.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level logged.")

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        _check_port(value)
        url = urlsplit(value.get_secret_value())
        if url.scheme != "unix" and not re.fullmatch(r"/?\d*", url.path):
            raise ValueError("its path must be the number of a database, as in redis://localhost:6379/0")
        return value

    @field_validator("openai_base_url", "stand_in_model_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value

    @field_validator("webhook_signing_key")
    @classmethod
    def _is_long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < MIN_SIGNING_KEY:
            raise ValueError(f"must have at least {MIN_SIGNING_KEY} characters: `openssl rand -base64 32` makes one")
        return value

    @field_validator("egress_trusted_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not re.fullmatch(r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", origin):
                raise ValueError("must be origins such as http://wiki.internal:8080, in lower case, without a path")
        try:
            read_origins(value)
        except EgressRefused as error:
            raise ValueError(f"holds an origin that is none: {error}") from None
        return value

    @field_validator("max_workers")
    @classmethod
    def _is_not_below(cls, value: int, others: ValidationInfo) -> int:
        if value < others.data.get("min_workers", 0):
            raise ValueError("must not be below MIN_WORKERS")
        return value

    @field_validator("langfuse_secret_key")
    @classmethod
    def _has_both_keys(cls, value: SecretStr | None, others: ValidationInfo) -> SecretStr | None:
        if (value is None) != (others.data.get("langfuse_public_key") is None):
            raise ValueError("goes with LANGFUSE_PUBLIC_KEY: both must be set, or none of them")
        return value

    @field_validator("langfuse_host", "phoenix_collector_endpoint", "langsmith_endpoint", "dd_otlp_endpoint")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None:
            check_url(value)
        return value

    @field_validator("dd_site")
    @classmethod
    def _is_site(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", value):
            raise ValueError("must be the name of a site, such as datadoghq.eu")
        return value

    @field_validator("otlp_endpoints")
    @classmethod
    def _are_endpoints(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            read_otlp_endpoints(value.get_secret_value())
        return value

    @field_validator("trace_urls", "redact_patterns", mode="before")
    @classmethod
    def _from_json(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError("must be JSON") from None

    @field_validator("trace_urls")
    @classmethod
    def _are_trace_urls(cls, value: dict[str, str]) -> dict[str, str]:
        for name, url in value.items():
            bare = url.replace("{trace_id}", "").replace("{run_id}", "")
            if bare == url or "{" in bare or "}" in bare:
                raise ValueError(f"the address of {name!r} must hold {{trace_id}} or {{run_id}}, and no other braces")
            check_url(bare)
        return value

    @field_validator("redact_patterns")
    @classmethod
    def _are_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for number, pattern in enumerate(value, 1):
            try:
                check_pattern(pattern)
            except ValueError as error:
                raise ValueError(f"pattern {number} {error}") from None
        return value

    @field_validator("agents", "egress_trusted_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("environment")
    @classmethod
    def _has_a_model(cls, value: str, others: ValidationInfo) -> str:
        if value != "development" and others.data.get("stand_in_model_url"):
            raise ValueError("does not go with STAND_IN_MODEL_URL, which is for development only")
        return value

    @field_validator("log_level", "environment", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @property
    def is_traced(self) -> bool:
        """Does any back end take traces?"""
        back_ends = (self.langfuse_public_key, self.phoenix_collector_endpoint, self.langsmith_api_key, self.dd_api_key)
        return any(back_ends) or self.otlp_endpoints is not None

    @property
    def otlp_receivers(self) -> tuple[OtlpEndpoint, ...]:
        """Those of `OTLP_ENDPOINTS`."""
        return read_otlp_endpoints(self.otlp_endpoints.get_secret_value()) if self.otlp_endpoints else ()

    @property
    def secrets(self) -> tuple[str, ...]:
        """Also what is in the headers that go to tracing back ends, with and without the scheme before it."""
        headers = [value for receiver in self.otlp_receivers for value in receiver.headers.values()]
        if self.langfuse_public_key and self.langfuse_secret_key:
            headers.append(basic(self.langfuse_public_key, self.langfuse_secret_key.get_secret_value()))
        return (*super().secrets, *headers, *(value.rpartition(" ")[2] for value in headers))

    @property
    def build(self) -> Build:
        """What is running."""
        return Build(image_digest=self.image_digest, git_revision=self.git_revision, environment=self.environment)

    @property
    def scaling(self) -> ScalingRules:
        """What the number of workers is decided by, besides what there is to do."""
        return ScalingRules(
            slots_per_worker=self.worker_concurrency,
            target_drain_s=self.target_drain_seconds,
            min_workers=self.min_workers,
            max_workers=self.max_workers,
        )

    @property
    def is_stand_in(self) -> bool:
        """Does the stand-in model answer?"""
        return self.openai_api_key is None and self.stand_in_model_url is not None

    def model_access(self) -> tuple[str, str | None]:
        """The model provider's key and address (None: OpenAI itself), or the stand-in's.

        Raises `ConfigurationError` where there is neither.
        """
        if self.openai_api_key is not None:
            return self.openai_api_key.get_secret_value(), self.openai_base_url
        if self.stand_in_model_url is not None:
            return "stand-in", self.stand_in_model_url
        raise ConfigurationError("OPENAI_API_KEY is missing: the worker cannot ask a model without it")


def _password_in(url: str) -> str | None:
    try:
        return urlsplit(url).password
    except ValueError:  # not an address
        return None


def _check_port(url: SecretStr) -> None:
    try:
        _ = urlsplit(url.get_secret_value()).port
    except ValueError:
        raise ValueError("its port must be a number between 0 and 65535") from None


S = TypeVar("S", bound=DatabaseSettings)


@overload
def load_settings() -> Settings: ...
@overload
def load_settings(kind: type[S]) -> S: ...
def load_settings(kind: type[DatabaseSettings] = Settings) -> DatabaseSettings:
    """Read the environment and the secrets directory.

    Raises `ConfigurationError`: one line that names every variable that is missing or malformed, never a value.
    """
    secrets_dir = Path(os.environ.get("SECRETS_DIR", DEFAULT_SECRETS_DIR))
    try:
        return kind(_secrets_dir=secrets_dir if secrets_dir.is_dir() else None)
    except ValidationError as error:
        raise ConfigurationError("; ".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    field = str(problem["loc"][0])
    variable = field.upper()
    if problem["type"] == "missing":
        return f"{variable} is missing: {Settings.model_fields[field].description}"
    return f"{variable} is malformed: {problem['msg'].removeprefix('Value error, ')}"
