"""What is hidden in a request stays data: it splits no header, no log line, and no connection into two requests."""

import json
import re
import unicodedata
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from app.api.middleware import REQUEST_ID_PATTERN
from app.devstack.access import make_key
from tests.api.wire import CLOSE, HOST, exchange
from tests.stack import Stack

NASTY = {
    "line feed": "a\nb",
    "carriage return": "a\r\nX-Injected: yes\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    "NUL": "a\0b",
    "escape sequence": "\x1b[2J\x1b[31mred\x1b]0;title\x07",
    "C1 control": "a\x9b31mb\x85c",
    "right to left": "abc\u202edcba\u202c",
    "isolates": "\u2066a\u2069",
    "invisible": "a\u200bb\ufeffc",
    "line separators": "a\u2028b\u2029c",
    "a line of ours": '"}\n{"time": "now", "level": "info", "event": "request"}',
    "very long": "x" * 5_000,
}


@pytest.fixture
def key(stack: Stack, tenant: str) -> str:
    return make_key(stack.database_url, tenant=tenant, name="test")


# -- one request stays one


BODY = b'{"agent":"toolbox","input":"script:unknown"}'
SMUGGLED = b"POST /v1/runs HTTP/1.1\r\n" + HOST + b"\r\n"


def post(key: str, headers: bytes, body: bytes = BODY, *, version: bytes = b"1.1") -> bytes:
    return (
        b"POST /v1/runs HTTP/%s\r\n" % version
        + HOST
        + CLOSE
        + f"Authorization: Bearer {key}\r\n".encode()
        + b"Content-Type: application/json\r\n"
        + headers
        + b"\r\n"
        + body
    )


LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
IN_CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)

TWO_WAYS_TO_READ = {
    "length and chunks": (LENGTH + CHUNKED, IN_CHUNKS + SMUGGLED),
    "chunks and length": (CHUNKED + b"Content-Length: 4\r\n", IN_CHUNKS + SMUGGLED),
    "two lengths": (LENGTH + b"Content-Length: 4\r\n", BODY),
    "the same length twice": (LENGTH + LENGTH, BODY),
    "a list of lengths": (b"Content-Length: 44, 44\r\n", BODY),
    "a length with a sign": (b"Content-Length: +44\r\n", BODY),
    "a negative length": (b"Content-Length: -1\r\n", BODY),
    "a hexadecimal length": (b"Content-Length: 0x2c\r\n", BODY),
    "a length beyond all": (b"Content-Length: 99999999999999999999999\r\n", BODY),
    "another coding": (b"Transfer-Encoding: gzip, chunked\r\n", IN_CHUNKS),
    "an unknown coding": (b"Transfer-Encoding: xchunked\r\n", IN_CHUNKS),
    "no coding": (b"Transfer-Encoding: identity\r\n", BODY),
    "chunked twice": (CHUNKED + CHUNKED, IN_CHUNKS),
    "chunked not last": (b"Transfer-Encoding: chunked, identity\r\n", IN_CHUNKS),
    "a tab in the coding": (b"Transfer-Encoding: \x0bchunked\r\n", IN_CHUNKS),
    "a space before the colon": (b"Content-Length : 44\r\n", BODY),
    "a folded field": (LENGTH + b"X-Long: a\r\n b\r\n", BODY),
    "a line feed alone": (LENGTH + b"X-Short: a\nX-Injected: b\r\n", BODY),
    "a carriage return alone": (LENGTH + b"X-Short: a\rX-Injected: b\r\n", BODY),
    "NUL in a field": (LENGTH + b"X-Short: a\0b\r\n", BODY),
    "an escape sequence in a field": (LENGTH + b"X-Short: \x1b[2J\r\n", BODY),
    "a size of a chunk that is none": (CHUNKED, b"zz\r\n" + BODY),
    "a chunk longer than it says": (CHUNKED, b"4\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "two keys": (LENGTH + b"Authorization: Bearer other\r\n", BODY),
    "two hosts": (LENGTH + b"Host: other.test\r\n", BODY),
    "two types": (LENGTH + b"Content-Type: text/plain\r\n", BODY),
    "two idempotency keys": (LENGTH + b"Idempotency-Key: a\r\nIdempotency-Key: b\r\n", BODY),
    "two request ids": (LENGTH + b"X-Request-Id: a\r\nX-Request-Id: b\r\n", BODY),
}


@pytest.mark.parametrize("name", TWO_WAYS_TO_READ)
def test_what_could_be_read_in_two_ways_is_refused_and_ends_the_connection(
    stack: Stack, client: httpx.Client, key: str, name: str
) -> None:
    headers, body = TWO_WAYS_TO_READ[name]
    [answer] = exchange(stack.api, post(key, headers, body))
    assert (answer.status, answer.problem) == (400, "bad-request")
    assert client.get("/v1/runs").json()["data"] == []


def test_chunks_are_not_for_http_1_0(stack: Stack, key: str) -> None:
    [answer] = exchange(stack.api, post(key, CHUNKED, IN_CHUNKS, version=b"1.0"))
    assert answer.status == 400


def test_the_same_request_without_the_trick_is_accepted(stack: Stack, key: str) -> None:
    for headers, body in ((LENGTH, BODY), (CHUNKED, IN_CHUNKS)):
        [answer] = exchange(stack.api, post(key, headers, body))
        assert answer.status == 202


@pytest.mark.parametrize(
    "line",
    [
        b"GET /v1/runs HTTP/1.1\r\n\r\n",  # no host
        b"GET /v1/runs\r\n\r\n",
        b"GET /v1/runs HTTP/2.0\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT a.test:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/\x1b[2J HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/a b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET\t/v1/runs HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # somebody speaks TLS
    ],
)
def test_what_is_not_a_request_is_told_so_once(stack: Stack, line: bytes) -> None:
    [answer] = exchange(stack.api, line)
    assert (answer.status, answer.problem) == (400, "bad-request")


def test_an_answer_is_not_lost_to_the_garbage_behind_its_request(stack: Stack, key: str) -> None:
    head = f"GET /v1/agents HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    [answer] = exchange(stack.api, head + b"GARBAGE\x01\r\n\r\n")
    assert answer.status == 200


def test_requests_one_behind_the_other_are_answered_in_order(stack: Stack) -> None:
    paths = ("/health/live", "/v1/nothing", "/version", "/health/live")
    sent = b"".join(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for path in paths[:-1])
    sent += f"GET {paths[-1]} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
    assert [answer.status for answer in exchange(stack.api, sent)] == [200, 404, 200, 200]


def test_what_follows_an_upgrade_is_not_another_request(stack: Stack, key: str) -> None:
    head = f"GET /v1/agents HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n".encode()
    [answer] = exchange(stack.api, head + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n" + head + b"\r\n")
    assert answer.status == 200


def test_a_field_behind_the_body_is_not_a_header(stack: Stack) -> None:
    """A key that comes as a trailer has not been seen by whatever checks keys in front of us."""
    key = make_key(stack.database_url, tenant="t", name="test")
    body = IN_CHUNKS[:-2] + f"Authorization: Bearer {key}\r\nX-Request-Id: late\r\n\r\n".encode()
    sent = (
        b"POST /v1/runs HTTP/1.1\r\n" + HOST + CLOSE + b"Content-Type: application/json\r\n" + CHUNKED + b"\r\n" + body
    )
    [answer] = exchange(stack.api, sent)
    assert answer.status == 401
    assert ("x-request-id", "late") not in answer.headers


# -- one request is one line of the log, and no answer has a header that was sent


class Log:
    """What a process logs from now on."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._begins = file.stat().st_size

    def of(self, how_many: int) -> list[dict[str, object]]:
        """The lines about so many requests, or more: the last is written when its answer has been sent already."""
        Stack.until(lambda: len(self.requests()) >= how_many)
        return self.requests()

    def requests(self) -> list[dict[str, object]]:
        """Of every line, which has to be JSON, those about requests."""
        text = self._file.read_bytes()[self._begins :].decode()
        assert all(char == "\n" or is_a_sign(char) for char in text)
        lines = [json.loads(line) for line in text.split("\n") if line]
        return [line for line in lines if line["event"] in ("request", "not a request")]


@pytest.fixture
def log(stack: Stack) -> Log:
    return Log(stack.api.log)


def is_a_sign(char: str) -> bool:
    """Not a control, an invisible one, one that turns the direction, or an end of a line."""
    return unicodedata.category(char) not in ("Cc", "Cf", "Zl", "Zp")


@pytest.mark.parametrize("name", NASTY)
def test_whatever_a_request_holds_it_is_one_line_of_the_log(client: httpx.Client, log: Log, name: str) -> None:
    text = NASTY[name]
    raw = text.encode().translate(None, b"\r\n\0\x07\x1b")  # what no HTTP client can send in a header
    run = {"agent": "support", "input": "x"}
    sent = [
        client.get(f"/v1/{quote(text, safe='')}"),
        client.get(f"/v1/runs/{quote(text, safe='')}"),
        client.get("/v1/runs", params={"agent": text}),
        client.get("/v1/runs", params={text: "a"}),
        client.post("/v1/runs", json={**run, "agent": text}),
        client.post("/v1/runs", json={**run, text: text}),
        client.post("/v1/runs", json={**run, "metadata": {text[:64]: text[:512]}}),
        client.post("/v1/runs", json={**run, "input": text}),
        client.post("/v1/runs", content=text.encode(), headers={"Content-Type": "application/json"}),
        client.get("/v1/agents", headers=[(b"X-Request-Id", raw)]),
        client.get("/v1/agents", headers=[(b"User-Agent", raw)]),
        client.get("/v1/agents", headers=[(b"X-Forwarded-For", raw)]),
        client.post("/v1/runs", json=run, headers=[(b"Idempotency-Key", raw)]),
    ]
    assert {answer.status_code for answer in sent} <= {200, 202, 404, 422}
    for answer in sent:
        assert "x-injected" not in answer.headers
        assert re.fullmatch(REQUEST_ID_PATTERN, answer.headers["x-request-id"])
        assert len(answer.headers.get_list("content-length")) == 1
        assert all(char.isprintable() for value in answer.headers.values() for char in value)
    assert len(log.of(len(sent))) == len(sent)


@pytest.mark.parametrize(
    "sent", [b"GET /\x1b[31m HTTP/1.1\r\n\r\n", b"\0\1\2\r\n\r\n", b"GET / HTTP/1.1\r\nA: \x1b\r\n\r\n"]
)
def test_what_is_not_a_request_is_one_line_too(stack: Stack, log: Log, sent: bytes) -> None:
    exchange(stack.api, sent)
    [line] = log.of(1)
    assert (line["event"], line["status"]) == ("not a request", 400)
