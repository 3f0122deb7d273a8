"""A worker whose event loop hangs: somebody else takes its runs over, it does no harm, and it recovers or ends."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
import redis

from app.devstack.stack import ROOT, Worker
from tests.scripts import DONE, Run, Script, audit_of, call, rest, submit
from tests.stack import Stack
from worker.ending import EXIT_FORCED


@pytest.fixture
def other(stack: Stack) -> Iterator[Worker]:
    """A second worker, not yet started."""
    worker = stack.another_worker("other")
    yield worker
    worker.stop()


@pytest.fixture
def hanging(stack: Stack) -> Iterator[Worker]:
    """The worker that is to hang."""
    yield stack.worker
    stack.worker.kill()


def hang(stack: Stack, client: httpx.Client, seconds: float) -> tuple[Run, Script]:
    """A run whose tool holds up the worker's event loop, from now on."""
    script = Script(stack.model_url, [call("hold_the_loop", {"seconds": seconds}), DONE])
    run = submit(client, "toolbox", script.input)
    stack.until(lambda: not is_live(stack.worker))
    return run, script


def is_live(worker: Worker) -> bool:
    try:
        return httpx.get(f"{worker.address}/health/live", timeout=0.5).status_code == 200
    except httpx.TransportError:
        return False


def test_a_worker_that_hangs_for_a_while_loses_its_runs_and_goes_on_without_them(
    stack: Stack, client: httpx.Client, hanging: Worker, other: Worker
) -> None:
    began = time.monotonic()
    run, script = hang(stack, client, 20)
    time.sleep(3.5)

    # It takes no jobs meanwhile.
    following = submit(client, "toolbox", Script(stack.model_url, [DONE]).input)
    with redis.Redis.from_url(stack.redis_url, decode_responses=True) as connection:
        for _ in range(10):
            stack.pause()
            assert connection.lrange("rq:queue:runs", 0, -1) == [following["id"]]

    other.start()
    ended = rest(client, run, seconds=10)
    assert (ended["status"], ended["attempt"]) == ("succeeded", 2)
    assert rest(client, following, seconds=3)["status"] == "succeeded"
    assert time.monotonic() - began < 20
    events = audit_of(client, run)

    # It says where it hangs, and that it no longer does.
    stack.until(lambda: "the event loop turns again" in hanging.tail(50), seconds=20)
    log = hanging.tail(50)
    assert log.count("the event loop is wedged") == 1
    assert "in hold_the_loop" in log

    # What it did meanwhile counts for nothing, and it works again.
    other.stop()
    after = submit(client, "toolbox", Script(stack.model_url, [DONE]).input)
    assert rest(client, after, seconds=5)["status"] == "succeeded"
    assert audit_of(client, run) == events
    assert len(script.requests()) == 2
    assert is_live(hanging)


def test_a_worker_that_hangs_for_good_ends_itself_and_leaves_no_trace(
    stack: Stack, client: httpx.Client, hanging: Worker
) -> None:
    pid = hanging.pid
    run, _ = hang(stack, client, 100)
    assert f" {pid})" in stack.rq_info()
    assert hanging.wait(40) == EXIT_FORCED
    stack.until(lambda: f" {pid})" not in stack.rq_info(), seconds=5)
    hanging.start()
    assert rest(client, run, seconds=10)["attempt"] == 2


def test_a_worker_that_hangs_does_not_look_alive_to_rq(stack: Stack, client: httpx.Client) -> None:
    patient = stack.another_worker("patient", LEASE_SECONDS="60")
    stack.worker.stop()
    patient.start()
    try:
        hang_up = Script(stack.model_url, [call("hold_the_loop", {"seconds": 100}), DONE])
        submit(client, "toolbox", hang_up.input)
        stack.until(lambda: not is_live(patient))
        stack.until(lambda: f" {patient.pid})" not in stack.rq_info(), seconds=40)
        assert patient.is_running
    finally:
        patient.kill()


def test_a_worker_that_hangs_is_gone_in_time_when_it_is_told_to_stop(
    stack: Stack, client: httpx.Client, hanging: Worker
) -> None:
    hang(stack, client, 100)
    began = time.monotonic()
    hanging.signal(signal.SIGTERM)
    assert hanging.wait(10) == EXIT_FORCED
    assert time.monotonic() - began < 5


def test_time_in_which_the_whole_process_was_frozen_does_not_count() -> None:
    hanging = """
import asyncio, time
from worker.watchdog import Watchdog

async def hang():
    Watchdog(ends_after=4).start()
    print(flush=True)
    time.sleep(60)

asyncio.run(hang())
"""
    with subprocess.Popen(
        [sys.executable, "-c", hanging], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as it:
        assert it.stdout is not None
        it.stdout.readline()
        it.send_signal(signal.SIGSTOP)
        time.sleep(5)
        it.send_signal(signal.SIGCONT)
        began = time.monotonic()
        assert it.wait(20) == EXIT_FORCED
    assert time.monotonic() - began > 3
