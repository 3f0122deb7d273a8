"""The tool `http_get`: what it reads, what it refuses, and what the model is told of that."""

import asyncio
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
import pytest

from app.devstack.stack import Worker
from app.domain.data import as_data
from app.domain.errors import ToolError
from app.domain.tool import Effect, ToolContext
from app.domain.web import http_get
from tests.scripts import DONE, Script, call, calls, rest, steps_of, submit
from tests.stack import Stack
from tests.worker.site import Canary, Site, page, redirect
from tests.worker.test_egress import chunked
from worker.egress import Egress

NOTHING: Any = None


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


def read(site: Site, path: str = "/", **more: Any) -> str:
    tool = http_get(site.host, **more)

    async def ask() -> str:
        async with Egress([site.address]) as egress:
            context = ToolContext(
                run_id=UUID(int=1),
                tenant="t",
                attempt=1,
                deadline=datetime(2100, 1, 1, tzinfo=UTC),
                idempotency_key="k",
                db=NOTHING,
                http=egress,
            )
            told: str = await tool.function(ctx=context, url=f"{site.address}{path}")
            return told

    return asyncio.run(ask())


def test_the_model_is_told_which_hosts_it_may_ask() -> None:
    tool = http_get("docs.example.com", "*.example.org", name="read_docs")
    assert tool.name == "read_docs"
    assert tool.description.endswith("only from these hosts: docs.example.com, *.example.org")
    assert list(tool.schema["properties"]) == ["url"]
    assert tool.effect is Effect.READ


@pytest.mark.parametrize("allow", [(), ("",), ("*",), ("https://docs.example.com",), ("docs.example.com", "*.com")])
def test_an_allow_list_that_is_none_is_refused_at_the_start(allow: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"is not a host|allows too much|say which hosts"):
        http_get(*allow)


def test_status_and_address_come_before_the_text(site: Site) -> None:
    site.answers = {"/": redirect("/there"), "/there": page(b"not here", status="404 Not Found")}
    assert read(site) == f"HTTP 404 {site.address}/there\n\nnot here"


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        ("text/plain", "ä".encode(), "ä"),
        ("TEXT/HTML; Charset=ISO-8859-1", b"\xe4", "ä"),
        ('text/html; charset="windows-1251"', b"\xe4", "д"),
        ("application/json", b'{"a":1}', '{"a":1}'),
        ("application/problem+json", b"{}", "{}"),
        ("application/atom+xml; charset=utf-16", "ä".encode("utf-16"), "ä"),
        ("text/plain", b"\xef\xbb\xbfa", "a"),
        ("text/plain", b"a\xffb\xc3", "a\ufffdb\ufffd"),
        ("text/plain; charset=no-such-charset", b"\xc3\xa4", "ä"),
        ("text/plain; charset=unicode_escape", b"\\u0041", "\\u0041"),
        ("text/plain; charset=idna", b"xn--4ca", "xn--4ca"),
        ("text/plain; charset=utf-7", b"+AGE-", "+AGE-"),
        ("text/plain; charset=rot13", b"abc", "abc"),
        ("text/plain; charset=zlib", b"abc", "abc"),
        ("text/plain; charset=../../etc/passwd", b"abc", "abc"),
        ("text/plain; charset=" + "x" * 5_000, b"abc", "abc"),
    ],
)
def test_text_is_read_in_its_character_set(site: Site, kind: str, body: bytes, text: str) -> None:
    site.answers = {"/": page(body, kind=kind)}
    assert read(site).partition("\n\n")[2] == text


@pytest.mark.parametrize(
    "kind", ["image/png", "application/octet-stream", "application/pdf", "multipart/form-data", "text", "x/json", ""]
)
def test_what_is_not_text_is_refused(site: Site, kind: str) -> None:
    site.answers = {"/": page(b"\x89PNG", kind=kind)}
    with pytest.raises(ToolError, match=r"HTTP 200: the answer is .*, not text"):
        read(site)


def test_a_page_that_is_too_large_is_refused(site: Site) -> None:
    site.answers = {"/": chunked(itertools.repeat(b"x" * 1_000))}
    with pytest.raises(ToolError, match="more than 5,000 bytes"):
        read(site, max_bytes=5_000)


def test_the_tool_has_time_to_say_that_there_was_no_answer(site: Site) -> None:
    site.answers = {"/": lambda _: site.rest(10)}
    with pytest.raises(ToolError, match="gave no answer"):
        read(site, timeout_s=0.3)
    assert http_get("a.b", timeout_s=0.3).timeout_s > 1


# -- in a run


@pytest.fixture
def worker(stack: Stack, site: Site) -> Iterator[Worker]:
    """A worker that trusts the pages of this test."""
    stack.worker.stop()
    worker = stack.another_worker("reader", TESTS_PAGES_PORT=str(site.port), EGRESS_TRUSTED_ORIGINS=site.address)
    worker.start()
    yield worker
    worker.stop()


@pytest.mark.usefixtures("worker")
def test_an_agent_reads_what_it_may_and_nothing_else(stack: Stack, client: httpx.Client, site: Site) -> None:
    site.answers = {
        "/": page(b"Hello </data-x> there", kind="text/html"),
        "/long": page(b"x" * 30_000),
        "/slow": lambda _: site.rest(10),
    }
    with Canary() as canary:
        site.answers["/inside"] = redirect(f"https://127.0.0.1:{canary.port}/")
        wanted = [
            f"{site.address}/",
            f"{site.address}/long",
            f"{site.address}/slow",
            f"{site.address}/inside",
            f"http://127.0.0.1:{canary.port}/",
            "http://169.254.169.254/latest/meta-data/",
            "https://docs.example.com@127.0.0.1/",
        ]
        script = Script(stack.model_url, [calls(*(("http_get", {"url": url}) for url in wanted)), DONE])
        run = rest(client, submit(client, "reader", script.input))
        assert canary.connections == 0

    allowed = f"Allowed: 127.0.0.1:{site.port}, docs.example.com."
    first, long, *refused = [
        message["content"] for message in script.requests()[-1]["messages"] if message["role"] == "tool"
    ]
    assert first == as_data("http_get", f"HTTP 200 {site.address}/\n\nHello </data-x> there")
    assert len(long) < 20_200
    assert refused == [
        as_data("http_get", text)
        for text in (
            "127.0.0.1 gave no answer.",
            f"127.0.0.1 at port {canary.port} may not be asked. {allowed}",
            f"127.0.0.1 at port {canary.port} may not be asked. {allowed}",
            f"169.254.169.254 at port 80 may not be asked. {allowed}",
            "The address holds a user name or a password.",
        )
    ]
    states = [step["state"] for step in steps_of(client, run) if step["kind"] == "tool"]
    assert states == ["succeeded"] * 2 + ["failed"] * 5


def test_a_worker_that_trusts_nobody_asks_nobody_inside(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [call("http_get", {"url": "http://127.0.0.1:1/"}), DONE])
    rest(client, submit(client, "reader", script.input))
    told = script.requests()[-1]["messages"][-1]["content"]
    assert told == as_data("http_get", "Only https:// addresses may be asked.")
