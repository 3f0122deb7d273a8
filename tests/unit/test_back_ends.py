"""Tracing back ends by settings: where spans go, where people look, and what is wrong before anything starts."""

import base64
import subprocess
import sys
from uuid import UUID

import pytest

from app.back_ends import BackEnd, TraceLinks, back_ends
from app.config import Settings, load_settings
from app.domain.errors import ConfigurationError
from app.redaction import Redaction

SECRET = "hunter2-hunter2"
RUN = UUID("01997e6e-4a3b-7c9d-8e1f-a2b3c4d5e6f7")
TRACE = "01997e6e4a3b7c9d8e1fa2b3c4d5e6f7"

LANGFUSE = {"LANGFUSE_PUBLIC_KEY": "pk-lf-1", "LANGFUSE_SECRET_KEY": SECRET}
PHOENIX = {"PHOENIX_COLLECTOR_ENDPOINT": "http://phoenix:6006"}


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("DATABASE_URL", "postgresql://db/agents")
    monkeypatch.setenv("REDIS_URL", "redis://redis/0")
    return monkeypatch


def settings(env: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        env.setenv(name, value)
    return load_settings()


def only(env: pytest.MonkeyPatch, **variables: str) -> BackEnd:
    (back_end,) = back_ends(settings(env, **variables))
    return back_end


def links(env: pytest.MonkeyPatch, **variables: str) -> dict[str, str]:
    return TraceLinks(settings(env, **variables)).of(RUN)


def test_nothing_is_traced_unless_a_back_end_is_named(env: pytest.MonkeyPatch) -> None:
    assert back_ends(settings(env)) == ()
    assert not settings(env).is_traced
    assert links(env) == {}


def test_langfuse_is_given_both_keys_and_asked_to_show_spans_at_once(env: pytest.MonkeyPatch) -> None:
    back_end = only(env, **LANGFUSE, LANGFUSE_HOST="https://langfuse.internal/")
    assert back_end.traces_url == "https://langfuse.internal/api/public/otel/v1/traces"
    scheme, _, credentials = back_end.headers["authorization"].partition(" ")
    assert (scheme, base64.b64decode(credentials)) == ("Basic", f"pk-lf-1:{SECRET}".encode())
    assert back_end.headers["x-langfuse-ingestion-version"] == "4"


@pytest.mark.parametrize("address", ["http://phoenix:6006", "http://phoenix:6006/", "http://phoenix:6006/v1/traces"])
def test_phoenix_may_be_named_by_its_server_or_by_its_receiver(env: pytest.MonkeyPatch, address: str) -> None:
    back_end = only(env, PHOENIX_COLLECTOR_ENDPOINT=address)
    assert (back_end.name, back_end.traces_url, dict(back_end.headers)) == (
        "phoenix",
        "http://phoenix:6006/v1/traces",
        {},
    )
    assert links(env) == {"phoenix": f"http://phoenix:6006/redirects/traces/{TRACE}"}


def test_phoenix_is_given_a_key_where_it_wants_one(env: pytest.MonkeyPatch) -> None:
    assert only(env, **PHOENIX, PHOENIX_API_KEY=SECRET).headers["authorization"] == f"Bearer {SECRET}"


def test_langsmith_is_told_the_project(env: pytest.MonkeyPatch) -> None:
    back_end = only(env, LANGSMITH_API_KEY=SECRET)
    assert back_end.traces_url == "https://api.smith.langchain.com/otel/v1/traces"
    assert back_end.headers == {"x-api-key": SECRET, "langsmith-project": "agent-service"}


@pytest.mark.parametrize(
    ("site", "receiver", "page"),
    [
        ("datadoghq.com", "https://otlp.datadoghq.com/v1/traces", "https://app.datadoghq.com/"),
        ("datadoghq.eu", "https://otlp.datadoghq.eu/v1/traces", "https://app.datadoghq.eu/"),
        ("us3.datadoghq.com", "https://otlp.us3.datadoghq.com/v1/traces", "https://us3.datadoghq.com/"),
    ],
)
def test_datadog_is_reached_in_its_region(env: pytest.MonkeyPatch, site: str, receiver: str, page: str) -> None:
    back_end = only(env, DD_API_KEY=SECRET, DD_SITE=site)
    assert back_end.traces_url == receiver
    assert back_end.headers == {"dd-api-key": SECRET, "dd-otlp-source": "llmobs"}
    assert links(env)["datadog"].startswith(page)
    assert TRACE in links(env)["datadog"]


def test_datadogs_receiver_may_be_another(env: pytest.MonkeyPatch) -> None:
    assert only(env, DD_API_KEY=SECRET, DD_OTLP_ENDPOINT="http://agent:4318/v1/traces").traces_url == (
        "http://agent:4318/v1/traces"
    )


def test_any_receiver_may_be_added_with_its_headers(env: pytest.MonkeyPatch) -> None:
    first, second, third, phoenix = (
        back_ends(
            settings(
                env,
                OTLP_ENDPOINTS=f"""
                    https://tempo.internal/v1/traces Authorization=Bearer%20{SECRET} x-scope-orgid=a%3Bb;
                    http://tempo.internal/v1/traces ;
                    http://phoenix/v1/traces;""",
                **PHOENIX,
            )
        )[number]
        for number in (1, 2, 3, 0)
    )
    assert first.headers == {"authorization": f"Bearer {SECRET}", "x-scope-orgid": "a;b"}
    assert (second.traces_url, dict(second.headers)) == ("http://tempo.internal/v1/traces", {})
    # No two have the same name, or their counts could not be told apart.
    names = [back_end.name for back_end in (first, second, third, phoenix)]
    assert names == ["tempo.internal", "tempo.internal-2", "phoenix-2", "phoenix"]


def test_all_of_them_at_once_are_all_of_them(env: pytest.MonkeyPatch) -> None:
    found = settings(
        env, **LANGFUSE, **PHOENIX, LANGSMITH_API_KEY="x", DD_API_KEY="x", OTLP_ENDPOINTS="http://tempo:4318/v1/traces"
    )
    names = [back_end.name for back_end in back_ends(found)]
    assert names == ["langfuse", "phoenix", "langsmith", "datadog", "tempo:4318"]


@pytest.mark.parametrize("one", LANGFUSE)
def test_one_key_of_langfuse_without_the_other_is_a_mistake(env: pytest.MonkeyPatch, one: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^LANGFUSE_SECRET_KEY is malformed: .*LANGFUSE_PUBLIC_KEY") as caught:
        settings(env, **{one: SECRET})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        SECRET,
        f"ftp://{SECRET}/v1/traces",
        f"https://user:{SECRET}@host/v1/traces",
        f"https://host:{SECRET}/v1/traces",
        "https://host",
        f"https://host/v1/traces#{SECRET}",
        f"https://host/v1/traces {SECRET}",
        f"https://host/v1/traces =Bearer%20{SECRET}",
        f"https://host/v1/traces authorization=Bearer {SECRET}",
        f"https://host/v1/traces authorization={SECRET}%0d%0ax:y",
        f"https://host/v1/traces content-type={SECRET}",
        f"https://host/v1/traces a={SECRET} A={SECRET}",
        f"https://one/v1/traces; {SECRET}",
    ],
)
def test_a_malformed_receiver_stops_the_start_and_is_not_shown(env: pytest.MonkeyPatch, value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^OTLP_ENDPOINTS is malformed: ") as caught:
        settings(env, OTLP_ENDPOINTS=value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LANGFUSE_HOST", f"https://u:{SECRET}@langfuse"),
        ("PHOENIX_COLLECTOR_ENDPOINT", SECRET),
        ("LANGSMITH_ENDPOINT", SECRET),
        ("DD_OTLP_ENDPOINT", SECRET),
        ("DD_SITE", f"https://{SECRET}.eu"),
        ("TRACE_URLS", SECRET),
        ("TRACE_URLS", f'["{SECRET}"]'),
        ("TRACE_URLS", f'{{"tempo": "https://{SECRET}"}}'),
        ("TRACE_URLS", f'{{"tempo": "https://{SECRET}/{{trace}}"}}'),
        ("TRACE_URLS", f'{{"tempo": "https://{SECRET}/{{trace_id}}{{"}}'),
        ("TRACE_URLS", f'{{"tempo": "{SECRET}/{{trace_id}}"}}'),
        ("REDACT_PATTERNS", f"[{SECRET}"),
        ("REDACT_PATTERNS", f'"{SECRET}"'),
        ("REDACT_PATTERNS", f'["a", "({SECRET}"]'),
    ],
)
def test_what_else_is_malformed_is_named_and_not_shown(env: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} is malformed: [^\n]*$") as caught:
        settings(env, **{name: value})
    assert SECRET not in str(caught.value)


def test_pages_are_where_the_settings_say(env: pytest.MonkeyPatch) -> None:
    pages = """{"langfuse": "https://langfuse.public/project/7/traces/{trace_id}",
                "tempo": "https://grafana/explore?trace={trace_id}&run={run_id}"}"""
    assert links(env, **LANGFUSE, **PHOENIX, TRACE_URLS=pages) == {
        "langfuse": f"https://langfuse.public/project/7/traces/{TRACE}",
        "phoenix": f"http://phoenix:6006/redirects/traces/{TRACE}",
        "tempo": f"https://grafana/explore?trace={TRACE}&run={RUN}",
    }


def test_langsmith_has_a_page_only_where_it_is_told(env: pytest.MonkeyPatch) -> None:
    assert links(env, LANGSMITH_API_KEY="x") == {}


def test_no_log_shows_a_header_of_a_back_end(env: pytest.MonkeyPatch) -> None:
    found = settings(env, **LANGFUSE, OTLP_ENDPOINTS="https://host/v1/traces authorization=Bearer%20another%2Ftoken")
    redact = Redaction(found.secrets).hide_secrets
    for back_end in back_ends(found):
        credentials = back_end.headers["authorization"].partition(" ")[2]
        assert credentials not in redact(f"sent {credentials} once")
        assert credentials not in repr(back_end)


def test_the_api_knows_the_addresses_without_any_sdk() -> None:
    loaded = """import sys, app.back_ends
found = [name for name in ("langfuse", "opentelemetry", "aiohttp", "httpx") if name in sys.modules]
sys.exit(str(found) if found else 0)"""
    subprocess.run([sys.executable, "-c", loaded], check=True)
