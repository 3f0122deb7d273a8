"""The faults: each is inflicted on a rig under load and taken back again. All chance in them comes from a `Random`."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from signal import SIGQUIT
from typing import Any

from tests.faults.proxy import Proxy
from tests.faults.rig import LEASE_SECONDS, Rig
from tests.faults.wire import anything, not_nil


@dataclass(frozen=True, slots=True)
class Fault:
    """`inflict` returns when the fault is over and everything runs again."""

    kind: str
    name: str
    inflict: Callable[[Rig, Random], None]


# -- processes


def _worker_is_killed(rig: Rig, random: Random) -> None:
    worker = random.choice(rig.workers)
    worker.kill()
    time.sleep(random.uniform(0, 2))
    worker.start()


def _worker_freezes(rig: Rig, random: Random) -> None:
    worker = random.choice(rig.workers)
    worker.pause()
    time.sleep(LEASE_SECONDS + random.uniform(0.5, 3))
    worker.resume()


def _worker_drains(rig: Rig, random: Random) -> None:
    random.choice(rig.workers).restart()


def _api_is_killed(rig: Rig, random: Random) -> None:
    rig.api.kill()
    time.sleep(random.uniform(0, 1))
    rig.api.start()


# -- Valkey


def _valkey_is_killed(rig: Rig, random: Random) -> None:
    rig.valkey.kill()
    time.sleep(random.uniform(0, 5))
    rig.valkey.start()


def _valkey_is_flushed(rig: Rig, random: Random) -> None:
    rig.flush_redis()


def _valkey_freezes(rig: Rig, random: Random) -> None:
    rig.valkey.pause()
    time.sleep(random.uniform(1, 6))
    rig.valkey.resume()


def _valkey_is_read_only(rig: Rig, random: Random) -> None:
    """As after a failover, when the old primary has become a replica."""
    with rig.redis() as connection:
        connection.replicaof("127.0.0.1", "1")
        time.sleep(random.uniform(1, 4))
        connection.replicaof("NO", "ONE")


def _valkey_is_full(rig: Rig, random: Random) -> None:
    with rig.redis() as connection:
        connection.config_set("maxmemory", "1")
        time.sleep(random.uniform(1, 4))
        connection.config_set("maxmemory", "0")


# -- Postgres


def _postgres_stops(rig: Rig, random: Random) -> None:
    rig.postgres.stop(SIGQUIT)  # an immediate shutdown: it recovers as from a crash
    time.sleep(random.uniform(0, 3))
    rig.postgres.start()


def _postgres_is_killed(rig: Rig, random: Random) -> None:
    rig.postgres.kill()
    time.sleep(random.uniform(0, 3))
    rig.postgres.start()


def _backends_are_terminated(rig: Rig, random: Random) -> None:
    for _ in range(random.randint(1, 3)):
        rig.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ~ '^(worker|api)'")
        time.sleep(random.uniform(0, 0.5))


# -- the network

Way = Callable[[Rig], Proxy]


def _cut(way: Way) -> Callable[[Rig, Random], None]:
    def inflict(rig: Rig, random: Random) -> None:
        for _ in range(random.randint(1, 5)):
            way(rig).cut()
            time.sleep(random.uniform(0, 0.5))

    return inflict


def _lasting(
    way: Way, fault: Callable[[Proxy], AbstractContextManager[Any]], longest: float
) -> Callable[[Rig, Random], None]:
    def inflict(rig: Rig, random: Random) -> None:
        with fault(way(rig)):
            time.sleep(random.uniform(longest / 2, longest))

    return inflict


def _reply_lost(way: Way, request: str, replies: Callable[[bytes], bool] = anything) -> Callable[[Rig, Random], None]:
    """The server has done it, and who asked for it does not know."""

    def inflict(rig: Rig, random: Random) -> None:
        swallowed = way(rig).swallow(request, replies=replies)
        rig.submit(2)
        swallowed.wait(15)

    return inflict


def _redis(rig: Rig) -> Proxy:
    return rig.redis_proxy


def _postgres(rig: Rig) -> Proxy:
    return rig.postgres_proxy


STATEMENTS = {
    "accept": "INSERT INTO runs",
    "claim": "SET status = 'running'",
    "step": "INSERT INTO steps",
    "end": "output = CAST(",
    "heartbeat": "SKIP LOCKED\n    ), extended",
}
"""What it is → a piece of the statement that commits it."""

PROVIDER = ["status:429", "status:500", "truncated", "bad_json", "disconnect", "stall", "slow_drip"]


def _provider(faults: list[str]) -> Callable[[Rig, Random], None]:
    def inflict(rig: Rig, random: Random) -> None:
        rig.weather(share=0.3, faults=faults, retry_after="0.5", seed=random.randrange(2**32))
        time.sleep(random.uniform(2, 3))
        rig.weather()

    return inflict


def _networks() -> Iterable[Fault]:
    for server, way in (("Valkey", _redis), ("Postgres", _postgres)):
        kind = f"network to {server}"
        yield Fault(kind, f"connections to {server} are cut", _cut(way))
        yield Fault(kind, f"connections to {server} are refused", _lasting(way, Proxy.refusing, 4))
        yield Fault(kind, f"{server} is 0.2 s away", _lasting(way, lambda proxy: proxy.delaying(0.2), 4))
        yield Fault(kind, f"{server} falls silent", _lasting(way, Proxy.silent, 6))


FAULTS = [
    Fault("worker", "a worker is killed", _worker_is_killed),
    Fault("worker", "a worker freezes", _worker_freezes),
    Fault("worker", "a worker drains", _worker_drains),
    Fault("API", "the API is killed", _api_is_killed),
    Fault("Valkey", "Valkey is killed", _valkey_is_killed),
    Fault("Valkey", "Valkey is flushed", _valkey_is_flushed),
    Fault("Valkey", "Valkey freezes", _valkey_freezes),
    Fault("Valkey", "Valkey is read-only", _valkey_is_read_only),
    Fault("Valkey", "Valkey is out of memory", _valkey_is_full),
    Fault("Postgres", "Postgres stops at once", _postgres_stops),
    Fault("Postgres", "Postgres is killed", _postgres_is_killed),
    Fault("Postgres", "Postgres ends all connections", _backends_are_terminated),
    *_networks(),
    Fault("lost reply of Valkey", "a pop's reply is lost", _reply_lost(_redis, "BLMOVE", not_nil)),
    Fault("lost reply of Valkey", "a transaction's reply is lost", _reply_lost(_redis, "EXEC")),
    *(
        Fault("lost reply of Postgres", f"the reply to a run's {name} is lost", _reply_lost(_postgres, statement))
        for name, statement in STATEMENTS.items()
    ),
    *(Fault("provider", f"the provider: {fault}", _provider([fault])) for fault in PROVIDER),
]
