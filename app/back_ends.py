"""The tracing back ends that the settings name: where each takes spans, and where people look at them.

Plain data: the worker sends, the API shows the addresses. Each of the four known ones takes OTLP over HTTP, by its own
address and headers; `OTLP_ENDPOINTS` adds any other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from uuid import UUID

from app.config import Settings
from app.domain.otlp import basic

LANGFUSE = "langfuse"
PHOENIX = "phoenix"
LANGSMITH = "langsmith"
DATADOG = "datadog"


@dataclass(frozen=True, slots=True)
class BackEnd:
    """`name`: its label in metrics and logs. `traces_url`: where its spans are posted to, with `headers`."""

    name: str
    traces_url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def back_ends(settings: Settings) -> tuple[BackEnd, ...]:
    """Those that are configured."""
    known = {back_end.name: back_end for back_end in _known(settings)}
    for endpoint in settings.otlp_receivers:
        name, number = endpoint.host, 1
        while name in known:
            number += 1
            name = f"{endpoint.host}-{number}"
        known[name] = BackEnd(name, endpoint.url, endpoint.headers)
    return tuple(known.values())


class TraceLinks:
    """Where people find the trace of a run."""

    def __init__(self, settings: Settings) -> None:
        self._templates = {**_known_pages(settings), **settings.trace_urls}

    def of(self, run_id: UUID) -> dict[str, str]:
        """Back end → address. Whether there is anything to see yet, or still, is not asked."""
        return {
            name: template.replace("{trace_id}", run_id.hex).replace("{run_id}", str(run_id))
            for name, template in self._templates.items()
        }


def _known(settings: Settings) -> Iterator[BackEnd]:
    if settings.langfuse_public_key and settings.langfuse_secret_key:
        key = settings.langfuse_public_key
        headers = {
            "authorization": f"Basic {basic(key, settings.langfuse_secret_key.get_secret_value())}",
            "x-langfuse-sdk-name": "python",
            "x-langfuse-public-key": key,
            # Without this the server shows spans minutes late.
            "x-langfuse-ingestion-version": "4",
        }
        yield BackEnd(LANGFUSE, f"{_root(settings.langfuse_host)}/api/public/otel/v1/traces", headers)
    if settings.phoenix_collector_endpoint:
        bearer = settings.phoenix_api_key
        headers = {"authorization": f"Bearer {bearer.get_secret_value()}"} if bearer else {}
        yield BackEnd(PHOENIX, f"{_phoenix(settings.phoenix_collector_endpoint)}/v1/traces", headers)
    if settings.langsmith_api_key:
        headers = {
            "x-api-key": settings.langsmith_api_key.get_secret_value(),
            "langsmith-project": settings.langsmith_project,
        }
        yield BackEnd(LANGSMITH, f"{_root(settings.langsmith_endpoint)}/otel/v1/traces", headers)
    if settings.dd_api_key:
        headers = {"dd-api-key": settings.dd_api_key.get_secret_value(), "dd-otlp-source": "llmobs"}
        url = settings.dd_otlp_endpoint or f"https://otlp.{settings.dd_site}/v1/traces"
        yield BackEnd(DATADOG, url, headers)


def _known_pages(settings: Settings) -> dict[str, str]:
    """LangSmith is not among them: its addresses need the ids of an organisation and a project."""
    pages = {}
    if settings.langfuse_public_key:
        pages[LANGFUSE] = f"{_root(settings.langfuse_host)}/trace/{{trace_id}}"
    if settings.phoenix_collector_endpoint:
        pages[PHOENIX] = f"{_phoenix(settings.phoenix_collector_endpoint)}/redirects/traces/{{trace_id}}"
    if settings.dd_api_key:
        pages[DATADOG] = f"https://{_datadog_app(settings.dd_site)}/llm/traces?query=trace_id:{{trace_id}}"
    return pages


def _datadog_app(site: str) -> str:
    """The first site of each domain has `app.` before it; a further one is a name of its own: us3.datadoghq.com."""
    return f"app.{site}" if site.count(".") == 1 else site


def _phoenix(endpoint: str) -> str:
    """Some write the address of the server, and some that of its receiver."""
    return _root(endpoint).removesuffix("/v1/traces")


def _root(address: str) -> str:
    return address.rstrip("/")
