"""The proxy that the other tests here break the network with, in front of Valkey."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.devstack.ports import LOOPBACK, free_port
from tests.faults.proxy import Proxy
from tests.faults.wire import RedisWire, not_nil
from tests.stack import Stack


@pytest.fixture(params=[65536, 3], ids=["whole", "in pieces"])
def chunk_bytes(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture
def valkey_proxy(servers: Stack, chunk_bytes: int) -> Iterator[Proxy]:
    with Proxy(servers.valkey.port, wire=RedisWire, chunk_bytes=chunk_bytes) as proxy:
        yield proxy


@contextmanager
def client_of(port: int, **options: object) -> Iterator[redis.Redis]:
    settings = {"db": 1, "socket_timeout": 10, "retry": Retry(NoBackoff(), 0), "decode_responses": True, **options}
    with redis.Redis(LOOPBACK, port, **settings) as client:  # type: ignore[arg-type]
        yield client


@pytest.fixture
def client(valkey_proxy: Proxy) -> Iterator[redis.Redis]:
    with client_of(valkey_proxy.port) as client:
        client.ping()
        yield client


@pytest.fixture
def valkey(servers: Stack, redis_url: str) -> Iterator[redis.Redis]:
    """Past the proxy; the database is empty."""
    with client_of(servers.valkey.port) as valkey:
        yield valkey


def connections_of(valkey: redis.Redis) -> dict[str, str]:
    """Those that the server has: name → last command."""
    connections: Any = valkey.client_list()
    return {connection["name"]: connection["cmd"] for connection in connections}


def seconds_of(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def test_what_is_said_passes_in_both_directions_and_in_order(client: redis.Redis, valkey: redis.Redis) -> None:
    texts = [f"{number} " + "x" * number for number in range(200)]
    pipeline = client.pipeline(transaction=False)
    for text in texts:
        pipeline.rpush("texts", text)
    assert pipeline.execute() == list(range(1, 201))
    assert client.lrange("texts", 0, -1) == valkey.lrange("texts", 0, -1) == texts


def test_a_cut_resets_what_is_open_and_serves_what_comes(
    client: redis.Redis, valkey: redis.Redis, valkey_proxy: Proxy
) -> None:
    client.client_setname("cut")
    connections = [socket.create_connection((LOOPBACK, valkey_proxy.port), timeout=5) for _ in range(20)]
    valkey_proxy.cut()
    for connection in connections:
        with connection, pytest.raises(ConnectionResetError):
            connection.recv(1)
    Stack.until(lambda: "cut" not in connections_of(valkey))
    assert client.ping()


def test_refusing_resets_what_is_open_and_lets_nobody_in_until_it_ends(
    client: redis.Redis, valkey_proxy: Proxy
) -> None:
    with valkey_proxy.refusing():
        with pytest.raises(redis.ConnectionError):
            client.ping()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, valkey_proxy.port), timeout=5)
    assert client.ping()


@pytest.mark.parametrize("chunk_bytes", [65536])
def test_a_delay_holds_each_chunk_in_both_directions_and_keeps_their_order(
    client: redis.Redis, valkey_proxy: Proxy
) -> None:
    assert seconds_of(client.ping) < 0.2
    with valkey_proxy.delaying(0.2):
        assert 0.4 <= seconds_of(client.ping) < 0.8
        with socket.create_connection((LOOPBACK, valkey_proxy.port), timeout=5) as connection:
            connection.sendall(b"ECHO 1\r\nECHO 2\r\n")
            with valkey_proxy.delaying(0):
                connection.sendall(b"ECHO 3\r\nQUIT\r\n")
                said = b"".join(iter(lambda: connection.recv(100), b""))
        assert said == b"$1\r\n1\r\n$1\r\n2\r\n$1\r\n3\r\n+OK\r\n"
        assert seconds_of(client.ping) >= 0.4
    assert seconds_of(client.ping) < 0.2


def test_in_silence_nothing_passes_and_nothing_is_closed(valkey: redis.Redis, valkey_proxy: Proxy) -> None:
    with client_of(valkey_proxy.port, socket_timeout=0.3, client_name="early") as early:
        early.ping()
        with socket.create_connection((LOOPBACK, valkey_proxy.port), timeout=0.3) as open_before:
            with valkey_proxy.silent():
                with pytest.raises(redis.TimeoutError):
                    early.set("said", "in silence")
                early.close()
                late = socket.create_connection((LOOPBACK, valkey_proxy.port), timeout=0.3)
                late.sendall(b"PING\r\n")
                with pytest.raises(TimeoutError):
                    late.recv(1)
                assert "early" in connections_of(valkey)
                assert not valkey.exists("said")
            for connection in (open_before, late):
                with connection, pytest.raises(ConnectionResetError):
                    connection.recv(1)
        Stack.until(lambda: "early" not in connections_of(valkey))
        assert not early.exists("said")


def test_the_server_hears_of_a_client_that_leaves(
    client: redis.Redis, valkey: redis.Redis, valkey_proxy: Proxy
) -> None:
    client.client_setname("leaving")
    client.close()
    Stack.until(lambda: "leaving" not in connections_of(valkey))


def test_where_no_server_is_listening_a_client_is_reset() -> None:
    with (
        Proxy(free_port(), wire=RedisWire) as proxy,
        pytest.raises(ConnectionResetError),
        socket.create_connection((LOOPBACK, proxy.port), timeout=5) as connection,
    ):
        connection.recv(1)


@pytest.mark.parametrize("chunk_bytes", [65536])
def test_a_slow_reader_gets_everything(valkey: redis.Redis, valkey_proxy: Proxy) -> None:
    text = "".join(f"{number:7} " for number in range(1_000_000))
    valkey.set("much", text)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(5)
        connection.connect((LOOPBACK, valkey_proxy.port))
        connection.sendall(b"SELECT 1\r\nGET much\r\nQUIT\r\n")
        time.sleep(0.3)
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert said == f"+OK\r\n${len(text)}\r\n{text}\r\n+OK\r\n".encode()


def test_a_pop_that_got_something_is_swallowed_and_one_that_timed_out_is_not(
    client: redis.Redis, valkey: redis.Redis, valkey_proxy: Proxy
) -> None:
    swallowed = valkey_proxy.swallow("BLMOVE", replies=not_nil)
    assert client.blmove("queue", "taken", 1) is None
    valkey.rpush("queue", "a", "b")
    with pytest.raises(redis.ConnectionError):
        client.blmove("queue", "taken", 1)
    swallowed.wait(1)
    assert valkey.lrange("taken", 0, -1) == ["a"]
    assert client.blmove("queue", "taken", 1) == "b"


def test_a_request_that_is_under_way_already_is_swallowed_too(
    client: redis.Redis, valkey: redis.Redis, valkey_proxy: Proxy
) -> None:
    client.client_setname("popping")
    with ThreadPoolExecutor(1) as thread:
        popping = thread.submit(client.blmove, "queue", "taken", 5)
        Stack.until(lambda: connections_of(valkey)["popping"] == "blmove")
        swallowed = valkey_proxy.swallow("BLMOVE", replies=not_nil)
        valkey.rpush("queue", "a")
        with pytest.raises(redis.ConnectionError):
            popping.result()
    swallowed.wait(1)
    assert valkey.lrange("taken", 0, -1) == ["a"]


def test_the_reply_to_a_transaction_is_swallowed_as_a_whole(
    client: redis.Redis, valkey: redis.Redis, valkey_proxy: Proxy
) -> None:
    swallowed = valkey_proxy.swallow("EXEC")
    pipeline = client.pipeline()
    pipeline.rpush("queue", "a")
    pipeline.rpush("queue", "b")
    with pytest.raises(redis.ConnectionError):
        pipeline.execute()
    swallowed.wait(1)
    assert valkey.lrange("queue", 0, -1) == ["a", "b"]


def test_what_a_transaction_queues_is_swallowed_when_it_is_executed(valkey: redis.Redis, valkey_proxy: Proxy) -> None:
    swallowed = valkey_proxy.swallow("INCR a")
    with (
        socket.create_connection((LOOPBACK, valkey_proxy.port), timeout=5) as connection,
        connection.makefile("rb") as answers,
    ):
        for command, answer in ((b"SELECT 1", b"+OK"), (b"MULTI", b"+OK"), (b"INCR a", b"+QUEUED")):
            connection.sendall(command + b"\r\n")
            assert answers.readline() == answer + b"\r\n"
        connection.sendall(b"EXEC\r\n")
        with pytest.raises(ConnectionResetError):
            answers.readline()
    swallowed.wait(1)
    assert valkey.get("a") == "1"


def test_a_reply_that_has_begun_to_arrive_is_not_swallowed() -> None:
    with (
        socket.create_server((LOOPBACK, free_port())) as listener,
        Proxy(listener.getsockname()[1], wire=RedisWire) as proxy,
        socket.create_connection((LOOPBACK, proxy.port), timeout=5) as connection,
        listener.accept()[0] as server,
    ):
        connection.sendall(b"GET a\r\n")
        assert server.recv(100) == b"GET a\r\n"
        for piece in (b"$2\r\nx", b"y\r\n"):
            server.sendall(piece)
            assert connection.recv(100) == piece
            proxy.swallow("GET")


def test_only_the_request_with_that_text_is_swallowed_and_only_once(
    client: redis.Redis, valkey: redis.Redis, valkey_proxy: Proxy
) -> None:
    swallowed = valkey_proxy.swallow("INCRBY b")
    assert [client.incr("a"), client.incr("c"), client.get("b")] == [1, 1, None]
    pipeline = client.pipeline(transaction=False)
    pipeline.incr("a")
    pipeline.incr("b")
    with pytest.raises(redis.ConnectionError):
        pipeline.execute()
    swallowed.wait(1)
    assert valkey.mget("a", "b", "c") == ["2", "1", "1"]
    assert client.incr("b") == 2


def test_a_swallow_that_is_cancelled_does_not_happen(
    client: redis.Redis, valkey: redis.Redis, valkey_proxy: Proxy
) -> None:
    swallowed = valkey_proxy.swallow("INCRBY")
    swallowed.cancel()
    assert [client.incr("a"), valkey.get("a")] == [1, "1"]
    with pytest.raises(AssertionError, match="INCRBY"):
        swallowed.wait(0)


def test_signals_pass_while_a_swallow_waits(client: redis.Redis, valkey: redis.Redis, valkey_proxy: Proxy) -> None:
    swallowed = valkey_proxy.swallow("BLMOVE")
    with client.pubsub() as pubsub:  # type: ignore[no-untyped-call]
        pubsub.subscribe("signals", "more")
        assert [pubsub.get_message(timeout=5)["data"] for _ in range(2)] == [1, 2]
        for number in range(3):
            valkey.publish("signals", f"BLMOVE {number}")
            assert pubsub.get_message(timeout=5)["data"] == f"BLMOVE {number}"
    with pytest.raises(redis.ConnectionError):
        client.blmove("queue", "taken", 1)
    swallowed.wait(1)


def test_a_proxy_that_has_ended_leaves_nothing(valkey: redis.Redis, servers: Stack) -> None:
    threads = threading.active_count()
    with Proxy(servers.valkey.port, wire=RedisWire) as proxy:
        connection = socket.create_connection((LOOPBACK, proxy.port), timeout=5)
        connection.sendall(b"CLIENT SETNAME left\r\n")
        assert connection.recv(100) == b"+OK\r\n"
    with connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, proxy.port), timeout=5)
    Stack.until(lambda: "left" not in connections_of(valkey))
    assert threading.active_count() == threads


def test_a_proxy_that_does_not_understand_what_it_hears_says_so(servers: Stack) -> None:
    with pytest.raises(ValueError, match="many"), Proxy(servers.valkey.port, wire=RedisWire) as proxy:
        connection = socket.create_connection((LOOPBACK, proxy.port), timeout=5)
        connection.sendall(b"*many\r\n")
        with connection, pytest.raises(ConnectionResetError):
            connection.recv(1)
