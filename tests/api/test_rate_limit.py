"""How often a key may ask. Buckets are tiny here, and fill by Redis' own clock."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import redis
import uvloop

from app.devstack.access import id_of, make_key, replace_key
from app.devstack.processes import Reaper
from app.devstack.servers import Valkey
from app.domain.errors import RateLimited
from app.domain.principal import KeyLimits, Principal, Scope
from app.rate_limit import PATIENCE_SECONDS, RateLimiter
from tests.api.conftest import StartApi, client_of
from tests.stack import Stack

As = Callable[..., httpx.Client]
SLOW: dict[str, Any] = {"requests_per_s": 0.01}
"""So slow that no token comes back while a test lasts."""


@pytest.fixture
def caller(stack: Stack, tenant: str) -> Iterator[As]:
    """A client with a key of these limits."""
    with ExitStack() as clients:

        def with_limits(*scopes: Scope, **limits: Any) -> httpx.Client:
            key = make_key(
                stack.database_url,
                tenant=tenant,
                name="test",
                scopes=scopes or tuple(Scope),
                limits=KeyLimits(**limits),
            )
            return clients.enter_context(client_of(stack.api, key))

        yield with_limits


def ask(client: httpx.Client, times: int = 1) -> list[int]:
    return [client.get("/v1/agents").status_code for _ in range(times)]


def unchecked(address: str) -> float:
    """How many requests were let through without a look at their rate."""
    text = httpx.get(f"{address}/metrics", trust_env=False).text
    (line,) = [line for line in text.splitlines() if line.startswith("agent_service_rate_limit_unchecked_total ")]
    return float(line.split()[1])


# -- the bucket


def test_what_exceeds_the_burst_is_refused_until_a_token_has_come_back(caller: As) -> None:
    client = caller(requests_per_s=1, burst=3)
    began = time.monotonic()
    assert ask(client, 3) == [200, 200, 200]
    refused = client.get("/v1/agents")
    assert time.monotonic() - began < 1
    assert (refused.status_code, refused.json()["type"]) == (429, "urn:agent-service:problem:rate-limited")
    assert refused.json()["detail"] == "this key may make 1 requests per second, and 3 at once"
    assert refused.headers["Retry-After"] == "1"
    time.sleep(1)
    assert ask(client, 2) == [200, 429]


def test_retry_after_is_as_long_as_it_takes(caller: As) -> None:
    client = caller(requests_per_s=0.25, burst=1)
    assert ask(client) == [200]
    assert client.get("/v1/agents").headers["Retry-After"] == "4"
    time.sleep(1.1)
    assert client.get("/v1/agents").headers["Retry-After"] == "3"


def test_a_refused_request_takes_no_token(caller: As) -> None:
    client = caller(requests_per_s=1, burst=1)
    assert ask(client, 6) == [200, 429, 429, 429, 429, 429]
    time.sleep(1)
    assert ask(client) == [200]


def test_many_at_once_get_exactly_the_burst(stack: Stack, caller: As) -> None:
    client = caller(**SLOW, burst=7)
    before = unchecked(stack.api.address)
    with ThreadPoolExecutor(30) as threads:
        statuses = list(threads.map(lambda _: ask(client)[0], range(120)))
    assert sorted(statuses) == [200] * 7 + [429] * 113
    assert unchecked(stack.api.address) == before


def test_one_key_does_not_use_up_another_s(caller: As) -> None:
    first, second = caller(**SLOW, burst=1), caller(**SLOW, burst=1)
    assert ask(first, 2) == [200, 429]
    assert ask(second, 2) == [200, 429]


def test_whoever_has_two_keys_for_a_while_has_one_bucket(stack: Stack, tenant: str) -> None:
    old = make_key(stack.database_url, tenant=tenant, name="test", limits=KeyLimits(**SLOW, burst=3))
    new = replace_key(stack.database_url, old)
    newest = replace_key(stack.database_url, new)
    with ExitStack() as clients:
        before, between, after = (clients.enter_context(client_of(stack.api, key)) for key in (old, new, newest))
        assert [*ask(before), *ask(between), *ask(after)] == [200, 200, 200]
        assert [*ask(after), *ask(between), *ask(before)] == [429, 429, 429]


def test_a_request_counts_whatever_becomes_of_it_and_scopes_come_later(caller: As) -> None:
    client = caller(Scope.RUNS_READ, **SLOW, burst=3)
    assert client.get("/v1/reviews").status_code == 403
    assert client.get("/v1/runs/nonsense").status_code == 404
    assert client.get("/v1/runs?limit=no").status_code == 422
    assert client.get("/v1/reviews").status_code == 429


def test_what_needs_no_key_is_not_limited_and_takes_no_token(stack: Stack, caller: As) -> None:
    client = caller(**SLOW, burst=1)
    for path in ("/health", "/health/live", "/health/ready", "/version", "/metrics", "/openapi.json"):
        assert client.get(path).status_code == 200
    assert ask(client, 2) == [200, 429]
    assert client.get("/health/live").status_code == 200


def test_new_limits_hold_at_once(stack: Stack, tenant: str) -> None:
    key = make_key(stack.database_url, tenant=tenant, name="test", limits=KeyLimits(**SLOW, burst=1))
    with client_of(stack.api, key) as client, psycopg.connect(stack.database_url, autocommit=True) as database:
        assert ask(client, 2) == [200, 429]
        change = "UPDATE api_keys SET requests_per_s = %s, burst = %s WHERE id = %s"
        database.execute(change, [1, 1, id_of(key)])
        assert client.get("/v1/agents").headers["Retry-After"] == "1"  # and not the 100 s of before
        time.sleep(1.05)
        database.execute(change, [0.01, 3, id_of(key)])
        assert ask(client, 4) == [200, 200, 200, 429]


# -- shared by all processes, kept in Redis


def test_all_api_processes_share_the_bucket(start_api: StartApi, database_url: str) -> None:
    key = make_key(database_url, tenant="own", name="test", limits=KeyLimits(**SLOW, burst=5))
    with (
        client_of(start_api(), key) as first,
        client_of(start_api(), key) as second,
        ThreadPoolExecutor(10) as threads,
    ):
        statuses = list(threads.map(lambda client: ask(client)[0], [first, second] * 10))
    assert sorted(statuses) == [200] * 5 + [429] * 15


def test_redis_may_forget_scripts_and_buckets(start_api: StartApi, database_url: str, redis_url: str) -> None:
    key = make_key(database_url, tenant="own", name="test", limits=KeyLimits(**SLOW, burst=2))
    api = start_api()
    with client_of(api, key) as client, redis.Redis.from_url(redis_url) as server:
        assert ask(client, 3) == [200, 200, 429]
        server.script_flush()
        assert ask(client) == [429]
        server.flushdb()
        assert ask(client, 3) == [200, 200, 429]
    assert unchecked(api.address) == 0


def test_a_bucket_is_stored_until_it_is_full_again(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as server:
        assert take(redis_url, limits(requests_per_s=10, burst=4), 2) == [True, True]
        (name,) = server.keys()
        assert name == b"agent-service:rate:holder"
        assert 100 < server.pttl(name) <= 200
        time.sleep(0.25)
        assert server.keys() == []


@pytest.mark.parametrize("stored", ["9999999999999999", "nonsense", "-5", ""])
def test_a_bucket_that_makes_no_sense_locks_nobody_out(redis_url: str, stored: str) -> None:
    """Such as after Redis' clock was set back."""
    with redis.Redis.from_url(redis_url) as server:
        server.set("agent-service:rate:holder", stored)
    told = take(redis_url, limits(requests_per_s=5, burst=2), 3)
    assert all(wait is True or 0 < wait <= 0.2 for wait in told), told
    time.sleep(0.2)
    assert take(redis_url, limits(requests_per_s=5, burst=2), 1) == [True]


@pytest.mark.parametrize(("rate", "burst"), [(0.01, 100_000), (10_000.0, 100_000), (3.0, 1), (0.3, 7), (7_000.0, 1)])
def test_limits_at_their_bounds_are_kept(redis_url: str, rate: float, burst: int) -> None:
    first, *others = take(redis_url, limits(requests_per_s=rate, burst=burst), min(burst, 3) + 1)
    assert first is True
    if burst == 1:
        assert all(wait is True or 0 < wait <= 1 / rate for wait in others)


def test_in_the_long_run_the_rate_is_kept(redis_url: str) -> None:
    async def ask_for_a_second() -> tuple[int, float]:
        limiter = RateLimiter(redis_url)
        admitted, began = 0, time.monotonic()
        while time.monotonic() - began < 1.0:
            try:
                admitted += await limiter.admit(principal(limits(requests_per_s=100, burst=10)))
            except RateLimited:
                await asyncio.sleep(0.002)
        took = time.monotonic() - began
        await limiter.aclose()
        return admitted, took

    admitted, took = uvloop.run(ask_for_a_second())
    assert 0.9 * 100 * took <= admitted <= 10 + 100 * took + 1


# -- Redis is away


@pytest.fixture
def own_valkey(directory: Path, reaper: Reaper) -> Iterator[Valkey]:
    valkey = Valkey(directory / "valkey", reaper=reaper, durable=False)
    valkey.start()
    yield valkey
    valkey.stop()


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_without_redis_requests_are_let_through_and_counted(
    start_api: StartApi, database_url: str, own_valkey: Valkey, how: str
) -> None:
    key = make_key(database_url, tenant="own", name="test", limits=KeyLimits(**SLOW, burst=2))
    api = start_api(REDIS_URL=own_valkey.url())
    with client_of(api, key) as client:
        assert ask(client, 3) == [200, 200, 429]
        if how == "killed":
            own_valkey.kill()
        else:
            own_valkey.pause()
        took = []
        for _ in range(30):
            began = time.monotonic()
            assert ask(client) == [200]
            took.append(time.monotonic() - began)
        assert max(took) < 0.6
        assert len([seconds for seconds in took if seconds > 0.2]) <= 2
        assert unchecked(api.address) == 30
        own_valkey.start() if how == "killed" else own_valkey.resume()
        Stack.until(lambda: ask(client) == [429])
        assert ask(client, 3) == [429, 429, 429]


def test_a_frozen_redis_holds_up_one_request_a_second(
    start_api: StartApi, database_url: str, own_valkey: Valkey
) -> None:
    key = make_key(database_url, tenant="own", name="test", limits=KeyLimits(**SLOW, burst=2))
    with client_of(start_api(REDIS_URL=own_valkey.url()), key) as client:
        ask(client)
        own_valkey.pause()
        ask(client)
        began, waited = time.monotonic(), 0

        def has_waited(_: int) -> bool:
            asked = time.monotonic()
            ask(client)
            return time.monotonic() - asked >= PATIENCE_SECONDS

        with ThreadPoolExecutor(8) as threads:
            while time.monotonic() - began < 3:
                waited += sum(threads.map(has_waited, range(32)))
        assert 1 <= waited <= 8  # and not eight each second
        own_valkey.resume()


def test_a_redis_whose_every_answer_is_slow_is_waited_for_no_longer() -> None:
    async def answer_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(4096):
                await asyncio.sleep(0.8 * PATIENCE_SECONDS)
                writer.write(b"+OK\r\n" * 2)
        finally:
            writer.close()

    async def ask_it() -> tuple[bool, float]:
        server = await asyncio.start_server(answer_slowly, "127.0.0.1", 0)
        limiter = RateLimiter(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/1")
        began = time.monotonic()
        checked = await limiter.admit(principal(limits(**SLOW, burst=1)))
        took = time.monotonic() - began
        await limiter.aclose()
        server.close()
        await asyncio.sleep(PATIENCE_SECONDS)
        return checked, took

    checked, took = asyncio.run(asyncio.wait_for(ask_it(), 10))
    assert not checked
    assert took < 1.5 * PATIENCE_SECONDS


def test_a_redis_that_takes_no_writes_is_as_good_as_away(redis_url: str, own_valkey: Valkey) -> None:
    with redis.Redis.from_url(own_valkey.url()) as server:
        server.config_set("maxmemory", "1")
        assert take(own_valkey.url(), limits(**SLOW, burst=1), 2) == [False, False]
        server.config_set("maxmemory", "0")
        assert take(own_valkey.url(), limits(**SLOW, burst=1), 1) == [True]
        server.replicaof("127.0.0.1", "1")
        assert take(own_valkey.url(), limits(**SLOW, burst=5), 1) == [False]


def limits(**given: Any) -> KeyLimits:
    return KeyLimits(**given)


def principal(allowed: KeyLimits) -> Principal:
    return Principal("key", "tenant", frozenset(Scope), "holder", allowed)


def take(redis_url: str, allowed: KeyLimits, times: int) -> Sequence[bool | float]:
    """What a process of the API is told: True, False where nobody knows, or the seconds to wait."""

    async def ask_redis() -> list[bool | float]:
        limiter = RateLimiter(redis_url)
        told: list[bool | float] = []
        for _ in range(times):
            try:
                told.append(await limiter.admit(principal(allowed)))
            except RateLimited:
                told.append(await limiter._take("holder", allowed.requests_per_s, allowed.burst))
        await limiter.aclose()
        return told

    return uvloop.run(ask_redis())
