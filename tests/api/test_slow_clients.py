"""A client that is slow, or many that do nothing, take nothing from the others."""

import asyncio
import json
import resource
import selectors
import socket
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.middleware import BODY_SECONDS
from app.api.protocol import HEAD_SECONDS, ProblemProtocol
from app.devstack.ports import LOOPBACK, free_port
from app.devstack.processes import Reaper
from app.devstack.stack import Api
from tests.api.conftest import StartApi, client_of
from tests.api.test_bad_input import expect
from tests.api.wire import answers, connect, read_all
from tests.scripts import submit
from tests.stack import Stack, clean_env

# -- the protocol alone, with less patience

IDLE_SECONDS = 1
LARGE = 30_000_000


class Hasty(ProblemProtocol):
    head_seconds = 0.5
    linger_seconds = 0.5
    read_seconds = 2.0
    read_bytes_per_second = 1e9


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    match scope["path"]:
        case "/large":
            answer: Response = PlainTextResponse(b"x" * LARGE)
        case "/parts":
            answer = StreamingResponse(_parts())
        case "/later":
            await asyncio.sleep(1.5 * IDLE_SECONDS)
            answer = PlainTextResponse(b"fine")
        case _:
            answer = PlainTextResponse(b"fine")
    await answer(scope, receive, send)


async def _parts() -> AsyncIterator[bytes]:
    for _ in range(100):
        yield b"x" * (LARGE // 100)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    port = free_port()
    config = uvicorn.Config(
        _app, host=LOOPBACK, port=port, http=Hasty, lifespan="off", log_config=None, timeout_keep_alive=IDLE_SECONDS
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield port
    server.should_exit = True
    thread.join()


GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def dial(port: int) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), timeout=10)


def drip(connection: socket.socket, drops: Iterator[bytes]) -> None:
    """Until the other side has had enough."""
    with suppress(OSError):
        for drop in drops:
            connection.sendall(drop)
            time.sleep(0.05)


def seconds_until_closed(connection: socket.socket) -> float:
    began = time.monotonic()
    with suppress(ConnectionResetError):
        assert connection.recv(1) == b""
    return time.monotonic() - began


def test_a_connection_that_sends_nothing_is_closed(port: int) -> None:
    with dial(port) as connection:
        assert 0.5 < seconds_until_closed(connection) < 3


def test_a_connection_is_closed_some_time_after_its_last_request(port: int) -> None:
    with dial(port) as connection:
        for _ in range(3):
            connection.sendall(GET)
            assert connection.recv(65_536).endswith(b"fine")
            time.sleep(IDLE_SECONDS * 0.7)
        assert seconds_until_closed(connection) < 3


def test_line_feeds_do_not_keep_a_connection_open(port: int) -> None:
    with dial(port) as connection:
        began = time.monotonic()
        drip(connection, iter([b"\r\n"] * 200))
        assert time.monotonic() - began < 3


def test_a_head_that_comes_byte_by_byte_is_refused(port: int) -> None:
    with dial(port) as connection:
        drip(connection, (bytes([byte]) for byte in b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: " + b"a" * 200))
        [answer] = answers(read_all(connection))
    assert (answer.status, answer.problem) == (408, "request-timeout")


def test_the_next_head_may_not_be_slow_either(port: int) -> None:
    with dial(port) as connection:
        connection.sendall(GET + GET[:10])
        first, second = answers(read_all(connection))
    assert (first.status, second.status, second.problem) == (200, 408, "request-timeout")


def test_a_body_that_nobody_wants_is_not_waited_for(port: int) -> None:
    with dial(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nx")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
        began = time.monotonic()
        drip(connection, iter([b"x"] * 90))
        assert time.monotonic() - began < 2


def test_a_body_that_comes_soon_after_the_answer_keeps_the_connection(port: int) -> None:
    with dial(port) as connection:
        for _ in range(2):
            connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nx")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
            connection.sendall(b"x")
            time.sleep(Hasty.linger_seconds + 0.2)


@pytest.mark.parametrize("path", ["/large", "/parts"])
def test_a_client_that_does_not_read_is_given_up(port: int, path: str) -> None:
    with dial(port) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        time.sleep(3)
        assert len(read_all(connection)) < LARGE


@pytest.mark.parametrize("path", ["/large", "/parts"])
def test_a_client_that_reads_is_given_everything(port: int, path: str) -> None:
    """Although it takes longer for that than an idle connection would stay open."""
    with dial(port) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        time.sleep(1.5 * IDLE_SECONDS)
        assert len(read_all(connection)) > LARGE


def test_a_request_may_take_longer_than_a_pause(port: int) -> None:
    with dial(port) as connection:
        for path in (b"/", b"/later", b"/later"):
            connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(65_536).endswith(b"fine")


def test_what_a_client_has_ended_is_ended(port: int) -> None:
    for sent in (b"", GET[:10], GET[:-2], b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"):
        with dial(port) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            began = time.monotonic()
            read_all(connection)
            assert time.monotonic() - began < 0.4


# -- the API, with its own patience

SLOW = 100
"""Clients of each kind."""
IDLE = 1_000
P95_SECONDS = 0.5
"""Of the others meanwhile: on a machine that does other things as well."""


@contextmanager
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8_192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_slow_clients_are_given_up_and_the_others_notice_nothing(start_api: StartApi, own_key: str) -> None:
    api = start_api()
    began = time.monotonic()
    key = f"Authorization: Bearer {own_key}\r\n".encode()
    with ExitStack() as stack, client_of(api, own_key) as client:
        stack.enter_context(many_files())
        run = submit(client, "support", "nobody takes it")

        def open_(how_many: int, sent: bytes) -> list[socket.socket]:
            opened = [stack.enter_context(connect(api, seconds=60)) for _ in range(how_many)]
            for connection in opened:
                connection.sendall(sent)
            return opened

        path = f"/v1/runs/{run['id']}?wait=60".encode()
        idle = open_(IDLE, b"")
        heads = open_(SLOW, b"POST /v1/runs HTTP/1.1\r\nHost: a\r\nX-Slow: ")
        body = b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        bodies = open_(SLOW, b"POST /v1/runs HTTP/1.1\r\nHost: a\r\n" + key + body)
        strangers = open_(SLOW, b"POST /v1/runs HTTP/1.1\r\nHost: a\r\n" + body)
        for abandoned in open_(SLOW, b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n" + key + b"\r\n"):
            abandoned.close()
        poll = threading.Thread(target=lambda: polled.append(client.get(f"/v1/runs/{run['id']}?wait=34", timeout=60)))
        polled: list[httpx.Response] = []
        poll.start()

        taken = []
        while time.monotonic() < began + HEAD_SECONDS + 5:
            asked = time.monotonic()
            assert client.get("/v1/agents").status_code == 200
            taken.append(time.monotonic() - asked)
            for connection in (*heads, *bodies):
                with suppress(OSError):
                    connection.sendall(b"a")
            time.sleep(0.05)
        p95 = statistics.quantiles(taken, n=20)[-1]
        print(f"{len(taken)} requests of others meanwhile: p95 {p95 * 1000:.0f} ms, max {max(taken) * 1000:.0f} ms")
        assert p95 < P95_SECONDS

        assert {answers(read_all(connection))[0].status for connection in heads} == {408}
        assert {answers(read_all(connection))[0].status for connection in strangers} == {401}
        [late] = {(answer.status, answer.problem) for connection in bodies for answer in answers(read_all(connection))}
        assert late == (408, "request-timeout")
        assert BODY_SECONDS < time.monotonic() - began < BODY_SECONDS + 15
        for connection in idle[:10]:  # an idle connection is not a slow one
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
        poll.join()
        assert polled[0].status_code == 200
        assert polled[0].json()["status"] == "queued"
    lines = [json.loads(line) for line in api.log.read_text().splitlines()]
    ended = [line for line in lines if line.get("path") == "/v1/runs/{run_id}" and line["event"] == "request"]
    assert len(ended) == SLOW + 1
    assert sorted(line["duration_ms"] for line in ended)[-2] < 15_000
    assert not [line for line in lines if line["level"] in ("error", "critical")]


FILES = 256
MOST = FILES - 64


class NarrowApi(Api):
    """An API that may have few files open, and fewer unless it asks."""

    @property
    def command(self) -> list[str]:
        limits = f"ulimit -S -n {FILES // 2}; ulimit -H -n {FILES}"
        return ["sh", "-c", f'{limits}; exec "$@"', "api", *super().command]


@pytest.fixture
def narrow(tmp_path: Path, reaper: Reaper, stack: Stack, database_url: str, redis_url: str) -> Iterator[Api]:
    api = NarrowApi("narrow", log=tmp_path / "narrow.log", reaper=reaper)
    api.env = clean_env(DATABASE_URL=database_url, REDIS_URL=redis_url) | api.own_env
    api.start()
    yield api
    api.stop()


def test_connections_without_a_request_make_room_for_new_ones(narrow: Api, own_key: str) -> None:
    with ExitStack() as stack:
        for sent in (b"", b"GET / HTTP/1.1\r\n", b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"):
            for _ in range(2 * FILES):
                stack.enter_context(connect(narrow)).sendall(sent)
            with client_of(narrow, own_key) as client:
                assert client.get("/v1/agents").status_code == 200
    assert "Too many open files" not in narrow.log.read_text()


def test_where_every_connection_has_a_request_one_more_is_told_to_come_back(narrow: Api, own_key: str) -> None:
    with client_of(narrow, own_key) as client:
        run = submit(client, "support", "nobody takes it")
    poll = f"GET /v1/runs/{run['id']}?wait=60 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {own_key}\r\n\r\n".encode()
    with ExitStack() as stack:
        polls = [stack.enter_context(connect(narrow)) for _ in range(MOST)]
        for connection in polls:
            connection.sendall(poll)
        time.sleep(1.5)
        readable = selectors.DefaultSelector()
        for connection in polls:
            readable.register(connection, selectors.EVENT_READ)
        assert readable.select(0) == [], "one of those that have room was answered"
        readable.close()
        for _ in range(3):
            with client_of(narrow, own_key) as client:
                response = client.get("/v1/agents")
            expect(response, 503, "unavailable")
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["connection"] == "close"
        assert httpx.get(f"{narrow.address}/health/live", trust_env=False).status_code == 200
        for connection in polls[:20]:
            connection.close()
        Stack.until(lambda: httpx.get(f"{narrow.address}/version", trust_env=False).status_code == 200)
    lines = [json.loads(line) for line in narrow.log.read_text().splitlines()]
    assert sum(line.get("status") == 503 for line in lines) >= 3
