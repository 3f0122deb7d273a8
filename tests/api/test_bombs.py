"""A request that is small and would take much to answer is refused before it does: in little memory, and for others."""

import gzip
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import psutil
import pytest

from app.api.body import MAX_VALUES
from app.api.middleware import MAX_BODY_BYTES
from app.api.protocol import LINGER_SECONDS, MAX_FIELDS, MAX_HEAD_BYTES, MAX_PARAMETERS
from app.db.runs import PAGE_BYTES
from app.devstack.stack import Api
from app.domain.pointer import MAX_ERRORS
from tests.api.test_bad_input import JSON, expect
from tests.api.wire import connect, exchange
from tests.scripts import submit
from tests.stack import Stack

ROOM = MAX_BODY_BYTES - 100
MEBIBYTE = 1_048_576
MORE_MEMORY = 96 * MEBIBYTE
"""What an API may need beyond what it has after a good request, for a bomb or for ten of them at once."""
PATIENCE_SECONDS = 2.0
"""For whoever asks something else meanwhile. What blocks the loop in a bomb is seconds, on any machine."""


def many(value: bytes) -> bytes:
    """As many of it as a body has room for."""
    return b"[" + b",".join([value] * (ROOM // (len(value) + 1))) + b"]"


BOMBS = {
    "brackets": b"[" * ROOM,
    "braces": b'{"a":' * (ROOM // 5),
    "closed brackets": b"[" * (ROOM // 2) + b"]" * (ROOM // 2),
    "deep arrays": many(b"[" * 60 + b"]" * 60),
    "empty arrays": many(b"[]"),
    "empty objects": many(b"{}"),
    "objects": many(b'{"a":1}'),
    "numbers": many(b"1"),
    "long numbers": many(b"9" * 1_001),
    "a very long number": b"9" * ROOM,
    "a very long fraction": b"[0." + b"1" * (ROOM - 10) + b",1e999]",
    "huge exponents": many(b"1e99999999"),
    "strings": many(b'""'),
    "escapes": many(b'"\\u0041"'),
    "names": b"{" + b",".join(b'"%x":1' % number for number in range(100_000)) + b"}",
    "the same name": b"{" + b",".join([b'"a":1'] * 150_000) + b"}",
    "names that are escapes of each other": b'{"a":1,"\\u0061":2}',
    "escaped quotes that never end": b'["' + b'\\"' * (ROOM // 3) + b"," * 100_000,
    "quotes and commas": b',"' * (ROOM // 2),
    "a string that never ends": b'"' + b"," * ROOM,
    "lone surrogates": b'["' + b"\\ud800" * (ROOM // 6 - 2) + b'"]',
    "many lone surrogates": many(b'"\\ud800"'),
    "a mark of its byte order": b"\xef\xbb\xbf{}",
}


@pytest.fixture
def api(stack: Stack) -> Api:
    return stack.api


@pytest.fixture
def own(client: httpx.Client) -> httpx.Client:
    submit(client, "toolbox", "x" * 90_000)
    return client


@contextmanager
def unharmed(api: Api) -> Iterator[None]:
    """Meanwhile others are answered, and the API does not grow."""
    process = psutil.Process(api.pid)
    before = process.memory_info().rss
    asked, stop = threading.Event(), threading.Event()
    slowest = most = 0.0

    def ask() -> None:
        nonlocal slowest, most
        with httpx.Client(base_url=api.address, trust_env=False, verify=False, timeout=30) as client:
            while not stop.is_set():
                began = time.monotonic()
                assert client.get("/health/live").status_code == 200
                slowest = max(slowest, time.monotonic() - began)
                most = max(most, process.memory_info().rss)
                asked.set()
                time.sleep(0.01)

    asking = threading.Thread(target=ask)
    asking.start()
    asked.wait(10)
    try:
        yield
    finally:
        stop.set()
        asking.join()
    print(f"the slowest of others {slowest * 1000:.0f} ms, {(most - before) / MEBIBYTE:+.0f} MiB")
    assert 0 < slowest < PATIENCE_SECONDS
    assert most - before < MORE_MEMORY


@pytest.mark.parametrize("name", BOMBS)
def test_a_json_bomb_is_refused_at_once(api: Api, own: httpx.Client, name: str) -> None:
    body = b'{"agent":"toolbox","input":' + BOMBS[name] + b"}"
    with unharmed(api):
        expect(own.post("/v1/runs", content=body, headers=JSON), 422, "invalid-request")
    assert len(own.get("/v1/runs").json()["data"]) == 1


def test_ten_bombs_at_once_are_no_worse(api: Api, own: httpx.Client) -> None:
    def throw(name: str) -> None:
        body = b'{"agent":"toolbox","input":' + BOMBS[name] + b"}"
        expect(own.post("/v1/runs", content=body, headers=JSON), 422, "invalid-request")

    throwing = [threading.Thread(target=throw, args=[name]) for name in list(BOMBS)[3:13]]
    with unharmed(api):
        for thread in throwing:
            thread.start()
        for thread in throwing:
            thread.join()


def test_a_body_has_so_many_values_and_text_has_as_many_commas_as_it_likes(own: httpx.Client) -> None:
    def submitting(values: int) -> httpx.Response:
        # Besides these: the body, the agent, and the input itself.
        run = {"agent": "typed", "input": [0] * (values - 3)}
        return own.post("/v1/runs", json=run)

    assert "20000 values" in expect(submitting(MAX_VALUES + 1), 422, "invalid-request")["detail"]
    assert "is not what agent typed takes" in expect(submitting(MAX_VALUES), 422, "invalid-request")["detail"]
    prose = ',[{"' * (MAX_VALUES + 1)
    assert own.post("/v1/runs", json={"agent": "toolbox", "input": prose}).status_code == 202


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "GZIP", "x-gzip"])
def test_what_is_compressed_is_not_unpacked(api: Api, own: httpx.Client, coding: str) -> None:
    body = gzip.compress(b'{"agent":"toolbox","input":"' + b"x" * 100 * MEBIBYTE + b'"}', compresslevel=1)[:ROOM]
    with unharmed(api):
        answer = own.post("/v1/runs", content=body, headers={**JSON, "Content-Encoding": coding})
    expect(answer, 415, "unsupported-media-type")
    assert answer.headers["accept-encoding"] == "identity"


def test_a_body_that_says_it_is_not_compressed_is_read(own: httpx.Client) -> None:
    run = {"agent": "toolbox", "input": "x"}
    assert own.post("/v1/runs", json=run, headers={"Content-Encoding": "identity"}).status_code == 202


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data; boundary=x", "multipart/form-data", "application/x-www-form-urlencoded"]
)
def test_forms_are_not_read(own: httpx.Client, content_type: str) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="agent"; filename="a"\r\n\r\n\r\n'
    headers = {"Content-Type": content_type}
    expect(own.post("/v1/runs", content=part * 10_000, headers=headers), 415, "unsupported-media-type")


def head(*lines: bytes) -> bytes:
    return b"".join(line + b"\r\n" for line in (*lines, b""))


LARGE_HEADS = {
    "10,000 fields": head(b"GET /health/live HTTP/1.1", b"Host: a", *(b"X-%d: a" % n for n in range(10_000))),
    "one field too many": head(b"GET /health/live HTTP/1.1", *[b"X-A: a"] * MAX_FIELDS, b"Host: a"),
    "a long address": head(b"GET /health/live?" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1", b"Host: a"),
    "a very long address": head(b"GET /" + b"a" * 5 * MEBIBYTE + b" HTTP/1.1", b"Host: a"),
    "10,000 parameters": head(
        b"GET /v1/runs?" + b"&".join(b"a%d" % n for n in range(10_000)) + b" HTTP/1.1", b"Host: a"
    ),
    "one parameter too many": head(b"GET /v1/runs?a" + b"&" * MAX_PARAMETERS + b" HTTP/1.1", b"Host: a"),
    "a long field": head(b"GET /health/live HTTP/1.1", b"Host: a", b"X-A: " + b"a" * MAX_HEAD_BYTES),
    "a field that never ends": b"GET /health/live HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 5 * MEBIBYTE,
    "a name that never ends": b"GET /health/live HTTP/1.1\r\nHost: a\r\n" + b"a" * 5 * MEBIBYTE,
    "an address that never ends": b"GET /" + b"a" * 5 * MEBIBYTE,
}


@pytest.mark.parametrize("name", LARGE_HEADS)
def test_a_head_that_is_too_large_is_refused(api: Api, own: httpx.Client, name: str) -> None:
    with unharmed(api):
        [answer] = exchange(api, LARGE_HEADS[name])
    assert (answer.status, answer.problem) == (431, "head-too-large")


def test_the_largest_head_that_is_allowed_is_read(api: Api, own: httpx.Client) -> None:
    fields = [b"X-%d: a" % number for number in range(MAX_FIELDS - 2)]
    [answer] = exchange(api, head(b"GET /health/live HTTP/1.1", b"Host: a", b"Connection: close", *fields))
    assert answer.status == 200
    long = b"X-A: " + b"a" * (MAX_HEAD_BYTES - 200)
    [answer] = exchange(api, head(b"GET /health/live HTTP/1.1", b"Host: a", b"Connection: close", long))
    assert answer.status == 200


def test_of_many_wrong_parameters_a_few_are_named(api: Api, own: httpx.Client) -> None:
    answer = own.get("/v1/runs?" + "&".join(f"a{number}" for number in range(MAX_PARAMETERS)))
    assert len(expect(answer, 422, "invalid-request")["errors"]) == MAX_ERRORS


def pour(connection: socket.socket, *, seconds: float) -> None:
    """Send more and more, until the other side has had enough. Fails where it takes so long."""
    until = time.monotonic() + seconds
    with suppress(OSError):
        while time.monotonic() < until:
            connection.sendall(b"a" * 65_536)
        pytest.fail(f"after {seconds:g} s it still reads")


def posting(client: httpx.Client, *lines: bytes) -> bytes:
    key = b"Authorization: " + client.headers["authorization"].encode()
    return head(b"POST /v1/runs HTTP/1.1", b"Host: a", key, b"Content-Type: application/json", *lines)


@pytest.mark.parametrize("beginning", [b"1;", b"0\r\nX-A: "])
def test_what_is_around_a_body_is_bounded_too(api: Api, own: httpx.Client, beginning: bytes) -> None:
    """An extension of a chunk, or a trailer, that never ends."""
    with unharmed(api), connect(api) as connection:
        connection.sendall(posting(own, b"Transfer-Encoding: chunked") + beginning)
        pour(connection, seconds=15)


def test_the_rest_of_what_is_too_large_is_not_read_for_ever(api: Api, own: httpx.Client) -> None:
    with unharmed(api), connect(api) as connection:
        connection.sendall(posting(own, b"Content-Length: 99999999999"))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")
        pour(connection, seconds=2 * LINGER_SECONDS)


# -- what is asked for may be much, too


def test_a_list_of_large_runs_has_shorter_pages(api: Api, client: httpx.Client) -> None:
    """A hundred runs on a page, each with the largest input there may be, would take half a gigabyte to answer."""
    subject = "x" * 900_000
    sent = [submit(client, "typed", {"subject": subject})["id"] for _ in range(20)]
    sent += [submit(client, "toolbox", "script:unknown")["id"] for _ in range(5)]
    found: list[str] = []
    params = {"limit": "100"}
    with unharmed(api):
        while True:
            response = client.get("/v1/runs", params=params)
            assert len(response.content) < PAGE_BYTES + 2 * MEBIBYTE
            page = response.json()
            found += [run["id"] for run in page["data"]]
            if page["next_cursor"] is None:
                break
            params["cursor"] = page["next_cursor"]
    assert found == sent[::-1]
