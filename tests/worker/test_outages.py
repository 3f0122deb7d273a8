"""A worker outlives a Redis that is away, for however long and in whatever way, and a Postgres that is slow."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx
import psycopg
import pytest
import redis
from rq.command import send_command, send_stop_job_command

from tests.scripts import DONE, Script, call, rest, say, steps_of, submit
from tests.stack import Stack

LONG_SECONDS = 13.0
"""More than each timeout and each wait for a reconnection there is."""


@contextmanager
def dead(stack: Stack) -> Iterator[None]:
    stack.valkey.kill()
    try:
        yield
    finally:
        stack.valkey.start()


@contextmanager
def frozen(stack: Stack) -> Iterator[None]:
    stack.valkey.pause()
    try:
        yield
    finally:
        stack.valkey.resume()


Outage = Callable[[Stack], AbstractContextManager[None]]


def rq(stack: Stack, *command: str) -> None:
    subprocess.run([sys.executable, "-m", "rq.cli", *command, "--url", stack.redis_url], check=True)


def rq_shows(stack: Stack, state: str) -> bool:
    """Does `rq info` show the worker, once, in this state?"""
    lines = [line for line in stack.rq_info().splitlines() if f" {stack.worker.pid})" in line]
    return [line.partition("): ")[2].split()[0] for line in lines] == [state]


def obeys_rq(stack: Stack, client: httpx.Client) -> None:
    """Assert that everything an operator does with RQ's tools works."""
    stack.until(lambda: rq_shows(stack, "idle"), seconds=15)
    script = Script(stack.model_url, [say("too late", delay_s=60)])
    run = submit(client, "toolbox", script.input)
    stack.until(script.requests)
    with redis.Redis.from_url(stack.redis_url) as connection:
        send_stop_job_command(connection, run["id"], serializer="json")
    assert rest(client, run, seconds=3)["status"] == "cancelled"

    rq(stack, "suspend")
    try:
        stack.until(lambda: rq_shows(stack, "suspended"))
        waiting = submit(client, "toolbox", Script(stack.model_url, [DONE]).input)
        assert client.get(f"/v1/runs/{waiting['id']}", params={"wait": 2}).json()["status"] == "queued"
    finally:
        rq(stack, "resume")
    assert rest(client, waiting, seconds=5)["status"] == "succeeded"
    stack.until(lambda: rq_shows(stack, "idle"))


def nothing_is_left(stack: Stack) -> bool:
    with redis.Redis.from_url(stack.redis_url) as connection:
        registries = ("rq:wip:runs", "rq:failed:runs")
        lists = ("rq:queue:runs", "rq:queue:runs:intermediate")
        return not any([*map(connection.zcard, registries), *map(connection.llen, lists)])


@pytest.mark.parametrize("outage", [dead, frozen])
def test_a_long_outage_of_redis_is_survived_without_a_trace(stack: Stack, client: httpx.Client, outage: Outage) -> None:
    pid = stack.worker.pid
    over_before_it, over_in_it, over_after_it = (
        submit(client, "toolbox", Script(stack.model_url, [say("slow", delay_s=seconds), DONE]).input)
        for seconds in (0.1, 5, LONG_SECONDS + 2)
    )
    assert rest(client, over_before_it)["status"] == "succeeded"
    with outage(stack):
        time.sleep(LONG_SECONDS)
        in_it = submit(client, "toolbox", Script(stack.model_url, [DONE]).input)
        assert client.get(f"/v1/runs/{over_in_it['id']}").json()["status"] == "succeeded"
    for run in (over_in_it, in_it, over_after_it):
        ended = rest(client, run)
        assert (ended["status"], ended["attempt"]) == ("succeeded", 1)
    obeys_rq(stack, client)
    stack.until(lambda: nothing_is_left(stack))
    assert (stack.worker.is_running, stack.worker.pid) == (True, pid)


@pytest.mark.parametrize("outage", [dead, frozen])
def test_a_worker_starts_without_redis_and_works_when_it_comes(
    stack: Stack, client: httpx.Client, outage: Outage
) -> None:
    stack.worker.stop()
    with outage(stack):
        run = submit(client, "toolbox", Script(stack.model_url, [DONE]).input)
        stack.worker.start()
        time.sleep(3)
        assert httpx.get(f"{stack.worker.address}/health/ready").status_code == 503
    assert rest(client, run)["status"] == "succeeded"
    obeys_rq(stack, client)


def test_a_command_that_nobody_understands_does_not_make_a_worker_deaf(stack: Stack, client: httpx.Client) -> None:
    stack.until(lambda: rq_shows(stack, "idle"), seconds=15)
    with redis.Redis.from_url(stack.redis_url, decode_responses=True) as connection:
        [worker] = [name for name in connection.scan_iter("rq:worker:*") if f"-{stack.worker.pid}-" in name]
        name = worker.removeprefix("rq:worker:")
        connection.publish(f"rq:pubsub:{name}", "not even JSON")
        send_command(connection, name, "sing", song="daisy")
    obeys_rq(stack, client)


def test_slow_queries_of_tools_hold_up_nobody_else(stack: Stack, client: httpx.Client) -> None:
    """Each takes twice the length of a lease, and there are more than the tools have connections."""
    slow = [call("ask_postgres", {"seconds": 6}), DONE]
    runs = [submit(client, "toolbox", Script(stack.model_url, slow).input) for _ in range(12)]
    neighbour = submit(client, "toolbox", Script(stack.model_url, [call("add", {"left": 1}), DONE]).input)
    assert rest(client, neighbour, seconds=4)["attempt"] == 1
    ended = [rest(client, run, seconds=40) for run in runs]
    assert {(run["status"], run["attempt"]) for run in ended} == {("succeeded", 1)}
    assert {steps_of(client, run)[1]["result"] for run in runs} == {"asked"}


def test_runs_whose_writes_are_held_up_cost_no_neighbour_its_lease(stack: Stack, client: httpx.Client) -> None:
    """More of them than the runs have connections, for longer than a lease."""
    scripts = [Script(stack.model_url, [say("soon", delay_s=2)]) for _ in range(12)]
    held_up = [submit(client, "toolbox", script.input)["id"] for script in scripts]
    slow = Script(stack.model_url, [say("at last", delay_s=9)])
    neighbour = submit(client, "toolbox", slow.input)
    for script in (*scripts, slow):
        stack.until(script.requests)
    with psycopg.connect(stack.database_url) as connection:
        connection.execute("SELECT FROM runs WHERE id = ANY(%s::uuid[]) FOR UPDATE", [held_up])
        time.sleep(7)
    ended = rest(client, neighbour)
    assert (ended["output"], ended["attempt"]) == ("at last", 1)
