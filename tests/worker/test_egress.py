"""What the service asks of other hosts, and what it refuses to: over real connections, with a name server of ours."""

import asyncio
import gzip
import itertools
import json
import resource
import socket
import time
import zlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from app.domain.errors import EgressRefused, ToolError
from app.domain.tool import HttpReply
from tests.worker.site import Canary, Site, authority, page, redirect
from tests.worker.ssrf import ATTEMPTS, NO_ANSWER, NOT_ALLOWED, UNREACHABLE, Attempt
from worker.egress import Egress
from worker.egress.guard import NotPublic, public_socket

T = TypeVar("T")


class Names:
    """What the name server says: for each name the lists that it gives, one after the other, the last one for ever."""

    def __init__(self) -> None:
        self.known: dict[str, Sequence[Sequence[str]]] = {}
        self.asked: list[str] = []
        self.delay_s = 0.0

    def look_up(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked.append(host)
        time.sleep(self.delay_s)
        if host not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        lists = self.known[host]
        addresses = lists[min(self.asked.count(host), len(lists)) - 1]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]


@pytest.fixture(scope="module")
def nobodys_authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authority(tmp_path_factory.mktemp("authority"), "nobody.example")[1]


@pytest.fixture(autouse=True)
def _few_authorities(nobodys_authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's are many, and read anew by each test."""
    monkeypatch.setenv("SSL_CERT_FILE", str(nobodys_authority))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    names = Names()
    monkeypatch.setattr(socket, "getaddrinfo", names.look_up)  # the world's, not ours
    return names


@pytest.fixture
def canary() -> Iterator[Canary]:
    with Canary() as canary:
        yield canary


@pytest.fixture
def site() -> Iterator[Site]:
    """On a trusted origin."""
    with Site() as site:
        yield site


def run(what: Coroutine[Any, Any, T]) -> T:
    """On the event loop that the worker uses."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(what)


def get(url: str, *allow: str, trusted: Sequence[str] = (), **more: Any) -> HttpReply:
    async def ask() -> HttpReply:
        async with Egress(trusted) as egress:
            return await egress.get(url, allow=allow, **more)

    return run(ask())


def get_from(site: Site, path: str, **more: Any) -> HttpReply:
    return get(f"{site.address}{path}", site.host, trusted=[site.address], **more)


def refusal(ask: Callable[..., object], *asked: Any, **more: Any) -> ToolError:
    with pytest.raises(ToolError) as caught:
        ask(*asked, **more)
    return caught.value


# -- addresses that may not be asked


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=[f"{attempt.how}" for attempt in ATTEMPTS])
def test_an_attempt_to_get_inside_reaches_nobody(attempt: Attempt, names: Names, canary: Canary, site: Site) -> None:
    url = attempt.url.format(port=canary.port)
    allow = [entry.format(port=canary.port) for entry in attempt.allow] or ["docs.example.com"]
    names.known = attempt.names
    site.answers = {"/go": redirect(url), "/again": redirect("/again")}
    begin = f"{site.address}/go" if attempt.via else url

    async def ask() -> list[ToolError]:
        errors = []
        async with Egress([site.address]) as egress:
            for _ in range(max((len(lists) for lists in attempt.names.values()), default=1)):
                with pytest.raises(ToolError) as caught:
                    await egress.get(begin, allow=[*allow, site.host], timeout_s=2)
                errors.append(caught.value)
        return errors

    error = run(ask())[-1]
    assert attempt.answer in str(error)
    assert canary.connections == 0
    if attempt.answer != NO_ANSWER:
        assert isinstance(error, EgressRefused)
    elif all(UNREACHABLE not in lists[-1] for lists in attempt.names.values()):
        assert isinstance(error.__cause__, NotPublic)
    for name, lists in attempt.names.items():
        assert names.asked.count(name) in (0, len(lists))  # once a connection: nothing is looked up for a check


def test_the_table_has_every_kind_of_attempt() -> None:
    assert len(ATTEMPTS) == len({(attempt.url, attempt.via) for attempt in ATTEMPTS}) >= 100
    assert len({attempt.answer for attempt in ATTEMPTS}) == 14


def test_without_the_guard_the_canary_would_be_reached(names: Names, canary: Canary) -> None:
    """What the table finds out, it can find out."""
    names.known = {"half-inside.example": [[UNREACHABLE, "127.0.0.1"]]}
    for host in ("127.0.0.1", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]", "half-inside.example"):
        before = canary.connections
        address = f"http://{host}:{canary.port}"
        refusal(get, address, address.removeprefix("http://"), trusted=[address], timeout_s=0.5)
        assert canary.connections == before + 1


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "::1", "::ffff:127.0.0.1", "fe80::1%lo"])
def test_no_socket_is_made_for_an_address_that_is_not_public(address: str) -> None:
    """Also not for one that no check before it has seen."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with pytest.raises(NotPublic):
        public_socket((family, socket.SOCK_STREAM, 6, "", (address, 443)))
    with public_socket((socket.AF_INET6, socket.SOCK_STREAM, 6, "", (UNREACHABLE, 443))):
        pass


def test_a_refusal_tells_nothing_of_the_network(names: Names) -> None:
    names.known = {"inside.example": [["10.1.2.3"]], "nobody.example": [[UNREACHABLE]]}
    told = {
        str(refusal(get, f"https://{host}/", host, timeout_s=2)).replace(host, "HOST")
        for host in ("inside.example", "nobody.example", "does-not-exist.example")
    }
    assert told == {"HOST gave no answer."}


def test_a_trusted_origin_is_reached_by_its_own_name_alone(names: Names, site: Site) -> None:
    names.known = {"wiki.internal": [["127.0.0.1"]], "other.example": [["127.0.0.1"]]}
    site.answers = {"/": page(b"inside")}
    wiki = f"http://wiki.internal:{site.port}"
    assert get(f"{wiki}/", f"wiki.internal:{site.port}", trusted=[wiki]).body == b"inside"

    for url in (
        f"https://other.example:{site.port}/",  # another name
        f"http://127.0.0.1:{site.port}/",  # no name
        f"https://wiki.internal:{site.port}/",  # another scheme
    ):
        allow = [f"{host}:{site.port}" for host in ("other.example", "127.0.0.1", "wiki.internal")]
        assert isinstance(refusal(get, url, *allow, trusted=[wiki]), EgressRefused)
    assert site.connections == 1


def test_a_trusted_origin_has_to_be_allowed_by_the_agent(site: Site) -> None:
    error = refusal(get, f"{site.address}/", "docs.example.com", trusted=[site.address])
    assert "may not be asked. Allowed: docs.example.com." in str(error)
    assert site.connections == 0


def test_a_connection_to_a_trusted_origin_is_no_way_to_it_for_others(names: Names, directory: Path) -> None:
    """Not even while one is open."""
    names.known = {"trusted.example": [["127.0.0.1"]], "other.example": [["127.0.0.1"]]}
    tls, _ = authority(directory, "trusted.example", "other.example")
    with Site(tls) as site:

        async def ask() -> None:
            async with Egress([f"https://trusted.example:{site.port}"]) as egress:
                for name in ("trusted.example", "other.example", "trusted.example", "other.example"):
                    with pytest.raises(EgressRefused):
                        await egress.get(f"https://{name}:{site.port}/", allow=[f"{name}:{site.port}"])

        run(ask())
        assert site.connections == 2


def test_nothing_is_taken_from_the_environment(
    site: Site, canary: Canary, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    netrc = directory / "netrc"
    netrc.write_text("default login somebody password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    site.answers = {"/": page(b"hello")}
    assert get_from(site, "/").body == b"hello"
    assert canary.connections == 0
    assert "authorization" not in site.requests[0].lower()


# -- redirects


def test_redirects_are_followed_and_the_last_address_is_told(site: Site) -> None:
    site.answers = {
        "/1": redirect("/2", "301 Moved Permanently"),
        "/2": redirect("3?a=b#here", "307 Temporary Redirect"),
        "/3": page(b"there"),
    }
    reply = get_from(site, "/1")
    assert (reply.status, reply.url, reply.body) == (200, f"{site.address}/3?a=b", b"there")


@pytest.mark.parametrize("hops", [5, 6])
def test_five_redirects_are_enough(site: Site, hops: int) -> None:
    site.answers = {f"/{hop}": redirect(f"/{hop + 1}") for hop in range(hops)}
    site.answers[f"/{hops}"] = page(b"there")
    if hops == 5:
        assert get_from(site, "/0").body == b"there"
    else:
        assert "More than 5 redirects" in str(refusal(get_from, site, "/0"))
    assert len(site.requests) == 6


def test_headers_stay_with_the_origin_that_they_were_meant_for(site: Site) -> None:
    with Site() as other:
        site.answers = {"/1": redirect("/2"), "/2": redirect(f"{other.address}/3")}
        other.answers = {"/3": redirect(f"{site.address}/4")}
        site.answers["/4"] = page(b"there")
        reply = get(
            f"{site.address}/1",
            site.host,
            other.host,
            trusted=[site.address, other.address],
            headers={"Authorization": "Bearer secret", "X-Api-Key": "secret"},
        )
    assert reply.body == b"there"
    assert ["secret" in request for request in site.requests] == [True, True, False]
    assert ["secret" in request for request in other.requests] == [False]


def test_an_answer_that_only_looks_like_a_redirect_is_an_answer(site: Site) -> None:
    site.answers = {"/": page(b"choose", "Location: /other", status="300 Multiple Choices")}
    assert get_from(site, "/").body == b"choose"
    site.answers = {"/": page(b"nowhere", status="302 Found")}
    assert get_from(site, "/").body == b"nowhere"


def test_cookies_are_not_kept(names: Names, site: Site) -> None:
    names.known = {"wiki.example": [["127.0.0.1"]]}
    site.answers = {
        "/1": page(b"", "Location: /2", "Set-Cookie: session=secret; Path=/", status="302 Found"),
        "/2": page(b"there"),
    }
    wiki = f"wiki.example:{site.port}"
    assert get(f"http://{wiki}/1", wiki, trusted=[f"http://{wiki}"]).body == b"there"
    assert "cookie" not in site.requests[1].lower()


# -- over TLS


def test_an_allowed_host_is_read_over_tls(names: Names, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names.known = {"docs.example.com": [["127.0.0.1"]]}
    tls, file = authority(directory, "docs.example.com")
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with Site(tls) as site:
        site.answers = {"/a%20b/%C3%A4": page(b"hello")}
        host = f"docs.example.com:{site.port}"
        reply = get(f"HTTPS://DOCS.example.com.:{site.port}/a%20b/ä?q=1", host, trusted=[f"https://{host}"])
        assert (reply.status, reply.body) == (200, b"hello")
        assert reply.url == f"https://{host}/a%20b/%C3%A4?q=1"
        assert f"Host: {host}\r\n" in site.requests[0]


def test_a_certificate_has_to_be_of_an_authority_and_for_the_name(
    names: Names, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.known = {"docs.example.com": [["127.0.0.1"]], "other.example.com": [["127.0.0.1"]]}
    tls, file = authority(directory, "docs.example.com")
    with Site(tls) as site:

        def ask(name: str) -> HttpReply:
            host = f"{name}:{site.port}"
            return get(f"https://{host}/", host, trusted=[f"https://{host}"])

        assert str(refusal(ask, "docs.example.com")) == "docs.example.com has no valid certificate."
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        assert str(refusal(ask, "other.example.com")) == "other.example.com has no valid certificate."
        assert ask("docs.example.com").status == 404
        assert len(site.requests) == 1


# -- how much


def chunked(chunks: Iterator[bytes], *headers: str) -> Callable[[socket.socket], None]:
    """Chunks for as long as the other side takes them."""

    def answer(connection: socket.socket) -> None:
        head = ["HTTP/1.1 200 OK", "Content-Type: text/plain", "Transfer-Encoding: chunked", *headers]
        connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n")
        for chunk in chunks:
            connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        connection.sendall(b"0\r\n\r\n")

    return answer


def bomb(megabytes: int) -> bytes:
    """So many megabytes of nothing, as a thousandth of that."""
    packer = zlib.compressobj(wbits=31)
    nothing = bytes(1_000_000)
    return b"".join([*(packer.compress(nothing) for _ in range(megabytes)), packer.flush()])


TEXT = b"hello " * 1_000
GZIPPED = gzip.compress(TEXT, mtime=0)
LIMIT = 10_000


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", GZIPPED),
        ("X-GZIP", GZIPPED),
        ("deflate", zlib.compress(TEXT)),
        ("identity", TEXT),
    ],
    ids=["gzip", "X-GZIP", "deflate", "identity"],
)
def test_a_compressed_answer_that_nobody_asked_for_is_read(site: Site, encoding: str, body: bytes) -> None:
    site.answers = {"/": page(body, f"Content-Encoding: {encoding}")}
    assert get_from(site, "/", max_bytes=len(TEXT)).body == TEXT
    assert "Accept-Encoding: identity\r\n" in site.requests[0]


TOO_MUCH: dict[str, Callable[[], Any]] = {
    "a hundred megabytes announced": lambda: b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\nhello",
    "one byte more": lambda: page(b"x" * (LIMIT + 1)),
    "one byte more, unannounced": lambda: b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (LIMIT + 1),
    "an endless body": lambda: chunked(itertools.repeat(b"x" * 1_000)),
    "an endless body of single bytes": lambda: chunked(itertools.repeat(b"x")),
    "a bomb of gzip": lambda: page(bomb(8), "Content-Encoding: gzip"),
    "a bomb of deflate": lambda: page(zlib.compress(bytes(8_000_000)), "Content-Encoding: deflate"),
    "a bomb in chunks": lambda: chunked(iter([bomb(8)]), "Content-Encoding: gzip"),
    "one byte more, compressed": lambda: page(gzip.compress(b"x" * (LIMIT + 1)), "Content-Encoding: gzip"),
    "nothing, compressed without end": lambda: chunked(
        itertools.chain([gzip.compress(b"")[:10]], itertools.repeat(b"\0\0\0\xff\xff" * 100)), "Content-Encoding: gzip"
    ),
}


@pytest.mark.parametrize("answer", TOO_MUCH.values(), ids=TOO_MUCH)
def test_an_answer_that_is_too_large_is_refused(site: Site, answer: Callable[[], Any]) -> None:
    site.answers = {"/": answer()}
    began = time.monotonic()
    error = refusal(get_from, site, "/", max_bytes=LIMIT, timeout_s=5)
    assert str(error) == "The answer has more than 10,000 bytes."
    assert isinstance(error, EgressRefused)
    assert time.monotonic() - began < 4


def test_exactly_as_much_as_allowed_is_read(site: Site) -> None:
    site.answers = {
        "/plain": page(b"x" * LIMIT),
        "/gzip": page(gzip.compress(b"x" * LIMIT), "Content-Encoding: gzip"),
        "/chunks": chunked(iter([b"x"] * LIMIT)),
    }
    for path in site.answers:
        assert len(get_from(site, path, max_bytes=LIMIT).body) == LIMIT


def test_a_bomb_takes_no_more_memory_than_what_is_allowed(site: Site) -> None:
    site.answers = {"/": page(bomb(100), "Content-Encoding: gzip")}
    refusal(get_from, site, "/", max_bytes=LIMIT)  # what the first one loads is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "more than 1,000,000 bytes" in str(refusal(get_from, site, "/", max_bytes=1_000_000))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 8_000


@pytest.mark.parametrize(
    ("encoding", "body", "why"),
    [
        ("br", b"x", "compressed in a way that is not understood"),
        ("gzip, gzip", gzip.compress(GZIPPED, mtime=0), "compressed in a way that is not understood"),
        ("gzip", b"not gzip", "compressed, and broken"),
        ("gzip", GZIPPED[:-5], "compressed, and broken"),
        ("gzip", GZIPPED + b"more", "compressed, and broken"),
        ("gzip", GZIPPED * 2, "compressed, and broken"),
    ],
    ids=["br", "twice", "not gzip", "cut off", "more behind it", "two in a row"],
)
def test_what_cannot_be_decompressed_is_refused(site: Site, encoding: str, body: bytes, why: str) -> None:
    site.answers = {"/": page(body, f"Content-Encoding: {encoding}")}
    assert why in str(refusal(get_from, site, "/"))


@pytest.mark.parametrize(
    "head",
    [
        b"X-Long: " + b"x" * 100_000,
        b"\r\n".join(b"X-%d: x" % number for number in range(10_000)),
        b"X-Broken",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: -1",
    ],
    ids=["a long header", "many headers", "no header", "two lengths", "no length"],
)
def test_a_head_that_is_not_sound_is_no_answer(site: Site, head: bytes) -> None:
    site.answers = {"/": b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\nhello"}
    error = refusal(get_from, site, "/", timeout_s=3)
    assert str(error) == "127.0.0.1 gave no answer."


# -- how long


def drip(site: Site, begin: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(begin)
        while True:
            site.rest(0.05)
            connection.sendall(piece)

    return answer


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\n", b"X"),
        (b"HTTP/1.1 200 OK\r\n", b"X-More: x\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["silence", "a slow header", "headers", "go on", "a slow body", "half a body", "slow chunks"],
)
def test_the_time_of_an_answer_is_bounded(site: Site, begin: bytes, piece: bytes) -> None:
    site.answers = {"/": drip(site, begin, piece)}
    began = time.monotonic()
    error = refusal(get_from, site, "/", timeout_s=0.6)
    assert str(error) == "127.0.0.1 gave no answer."
    assert 0.5 < time.monotonic() - began < 5


def test_the_time_is_bounded_over_all_redirects(site: Site) -> None:
    def slowly(connection: socket.socket) -> None:
        site.rest(0.4)
        connection.sendall(redirect("/"))

    site.answers = {"/": slowly}
    assert str(refusal(get_from, site, "/", timeout_s=0.6)) == "127.0.0.1 gave no answer."
    assert len(site.requests) == 2


def test_a_name_server_that_keeps_silent_holds_up_nobody_else(names: Names, site: Site) -> None:
    names.delay_s = 1.5

    async def ask() -> float:
        async with Egress([site.address]) as egress:
            began = time.monotonic()
            stuck = [
                asyncio.create_task(egress.get(f"https://a{n}.slow.example/", allow=["*.slow.example"], timeout_s=0.5))
                for n in range(20)
            ]
            await asyncio.sleep(0.1)
            loop = asyncio.get_running_loop()
            await asyncio.gather(*(loop.run_in_executor(None, time.time) for _ in range(40)))
            spent = time.monotonic() - began
            for error in await asyncio.gather(*stuck, return_exceptions=True):
                assert isinstance(error, ToolError)
            return spent

    assert run(ask()) < 0.4


# -- headers, and webhooks


@pytest.mark.parametrize("value", ["a\r\nX-Injected: 1", "a\nb", "a\0b", "a\rb"])
def test_a_header_is_one_line(site: Site, value: str) -> None:
    assert str(refusal(get_from, site, "/", headers={"X-Value": value})) == "A header holds a control character."
    assert site.connections == 0


def post(url: str, *, trusted: Sequence[str] = (), **more: Any) -> HttpReply:
    async def ask() -> HttpReply:
        async with Egress(trusted) as egress:
            headers = {"content-type": "application/json", "webhook-id": "msg_1"}
            return await egress.post(url, b'{"a":1}', **{"headers": headers, "timeout_s": 2, **more})

    return run(ask())


def test_a_webhook_is_posted_as_it_is(site: Site) -> None:
    site.answers = {"/hook": page(b"thank you", "Retry-After: 7")}
    reply = post(f"{site.address}/hook", trusted=[site.address])
    assert (reply.status, reply.body, reply.retry_after) == (200, b"thank you", "7")
    head, _, body = site.requests[0].partition("\r\n\r\n")
    assert head.startswith("POST /hook HTTP/1.1\r\n")
    assert "webhook-id: msg_1" in head
    assert json.loads(body) == {"a": 1}


def test_a_redirect_of_a_webhook_is_an_answer(site: Site, canary: Canary) -> None:
    site.answers = {"/hook": redirect(f"http://127.0.0.1:{canary.port}/")}
    assert post(f"{site.address}/hook", trusted=[site.address]).status == 302
    assert canary.connections == 0


def test_of_a_webhooks_answer_the_beginning_is_read(site: Site) -> None:
    site.answers = {"/hook": chunked(itertools.repeat(b"x" * 1_000))}
    assert post(f"{site.address}/hook", trusted=[site.address], max_bytes=1_500).body == b"x" * 1_500


POSTED = [attempt for attempt in ATTEMPTS if attempt.allow and not attempt.via and attempt.answer != NOT_ALLOWED]


@pytest.mark.parametrize("attempt", POSTED, ids=[attempt.how for attempt in POSTED])
def test_a_webhook_gets_no_further_inside_than_a_tool(attempt: Attempt, names: Names, canary: Canary) -> None:
    names.known = {name: [lists[-1]] for name, lists in attempt.names.items()}
    assert attempt.answer in str(refusal(post, attempt.url.format(port=canary.port)))
    assert canary.connections == 0
