"""How a worker ends. Leases last a minute here: whatever goes on at once does not wait for one to expire."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

import httpx
import psutil
import psycopg
import pytest

from app.devstack.stack import Worker
from app.domain.run import Priority
from app.queue import RunQueue
from tests.scripts import DONE, Run, Script, audit_of, call, rest, say, steps_of, submit
from tests.stack import Stack
from worker.dequeue import JobSource, connect
from worker.ending import EXIT_FORCED

DRAIN_SECONDS = 6.0
AT_MOST = DRAIN_SECONDS + 1.0


@pytest.fixture(scope="module", autouse=True)
def _long_leases(_service: Stack) -> Iterator[None]:
    worker = _service.worker
    worker.stop()
    usual = worker.env or {}
    worker.env = {**usual, "LEASE_SECONDS": "60", "DRAIN_SECONDS": str(DRAIN_SECONDS)}
    yield
    worker.stop()
    worker.env = usual


@pytest.fixture
def second(stack: Stack) -> Iterator[Worker]:
    """One that is to go on in the other's place, not yet started."""
    worker = stack.another_worker("second", LEASE_SECONDS="60")
    yield worker
    worker.stop()


def seconds_until_gone(worker: Worker, *signals: signal.Signals, exit_code: int = 0) -> float:
    """Send signals, a moment apart; the time from the last one to the end of the process."""
    for number in signals:
        worker.signal(number)
        began = time.monotonic()
        time.sleep(0.3)
    assert worker.wait(20) == exit_code
    return time.monotonic() - began


def started(stack: Stack, client: httpx.Client, script: Script) -> Run:
    """A run whose model has been asked for all that the script has."""
    run = submit(client, "toolbox", script.input, priority="high")
    stack.until(lambda: len(script.requests()) >= 1)
    return run


def in_call(stack: Stack, client: httpx.Client, tool: str, **arguments: object) -> tuple[Run, Script]:
    """A run whose tool is being called."""
    script = Script(stack.model_url, [call(tool, arguments), DONE])
    run = submit(client, "toolbox", script.input)
    stack.until(lambda: len(steps_of(client, run)) == 1)
    time.sleep(0.3)
    return run, script


def log_of_last_start(worker: Worker) -> str:
    return worker.log.read_text().rpartition("worker started")[2]


def status_of(client: httpx.Client, run: Run) -> str:
    return str(client.get(f"/v1/runs/{run['id']}").json()["status"])


@contextmanager
def frozen_postgres(stack: Stack) -> Iterator[None]:
    """Each of its processes: the first alone would only keep new connections away."""
    processes = [psutil.Process(stack.postgres.pid), *psutil.Process(stack.postgres.pid).children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def test_an_idle_worker_is_gone_within_its_blocking_pop(stack: Stack) -> None:
    assert seconds_until_gone(stack.worker, signal.SIGTERM) < 2


def test_a_run_reaches_its_next_commit_and_goes_on_elsewhere_from_there(
    stack: Stack, client: httpx.Client, second: Worker
) -> None:
    script = Script(stack.model_url, [call("echo", {"text": "a"}, delay_s=1), DONE])
    run = started(stack, client, script)
    assert seconds_until_gone(stack.worker, signal.SIGTERM) < 2.5
    assert status_of(client, run) == "queued"
    assert [step["kind"] for step in steps_of(client, run)] == ["model"]
    second.start()
    assert rest(client, run, seconds=3)["status"] == "succeeded"
    assert len(script.requests()) == 2


def test_a_call_that_takes_too_long_is_abandoned_and_nothing_else_is_asked_twice(
    stack: Stack, client: httpx.Client, second: Worker
) -> None:
    script = Script(stack.model_url, [call("charge", {"amount": 5}), say("too late", delay_s=30), DONE])
    run = submit(client, "toolbox", script.input)
    stack.until(lambda: len(script.requests()) == 2)
    second.start()
    assert seconds_until_gone(stack.worker, signal.SIGTERM) < AT_MOST
    ended = rest(client, run, seconds=3)
    assert (ended["status"], ended["attempt"]) == ("succeeded", 2)
    assert len(script.requests()) == 3
    assert audit_of(client, run).count("tool.intended") == 1


def test_a_tool_that_heeds_no_cancellation_loses_its_run(stack: Stack, client: httpx.Client, second: Worker) -> None:
    run, _ = in_call(stack, client, "cling", seconds=60)
    pid = stack.worker.pid
    second.start()
    assert seconds_until_gone(stack.worker, signal.SIGTERM) < AT_MOST
    assert f" {pid})" not in stack.rq_info()
    ended = rest(client, run, seconds=3)
    assert (ended["status"], ended["attempt"]) == ("succeeded", 2)
    assert "run.requeued" in audit_of(client, run)


def test_asked_twice_a_worker_waits_for_no_run(stack: Stack, client: httpx.Client, second: Worker) -> None:
    script = Script(stack.model_url, [say("too late", delay_s=30), DONE])
    run = started(stack, client, script)
    assert seconds_until_gone(stack.worker, signal.SIGTERM, signal.SIGINT) < 2
    assert status_of(client, run) == "queued"
    second.start()
    assert rest(client, run, seconds=3)["attempt"] == 2


def test_asked_twice_a_worker_is_gone_soon_whatever_its_tools_do(
    stack: Stack, client: httpx.Client, second: Worker
) -> None:
    run, _ = in_call(stack, client, "cling", seconds=60)
    assert seconds_until_gone(stack.worker, signal.SIGTERM, signal.SIGTERM) < 3
    assert status_of(client, run) == "queued"


def test_asked_a_third_time_a_worker_is_gone_at_once(stack: Stack, client: httpx.Client, second: Worker) -> None:
    in_call(stack, client, "cling", seconds=60)
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGTERM)
    assert seconds_until_gone(stack.worker, *asked, exit_code=EXIT_FORCED) < 1
    log = log_of_last_start(stack.worker)
    assert [log.count(f"asked to stop{how}") for how in ('"', " again", " a third time")] == [1, 1, 1]


def test_a_postgres_that_does_not_answer_does_not_hold_up_the_end(
    stack: Stack, client: httpx.Client, second: Worker
) -> None:
    started(stack, client, Script(stack.model_url, [say("late", delay_s=1), DONE]))
    with frozen_postgres(stack):
        assert seconds_until_gone(stack.worker, signal.SIGTERM) < AT_MOST


def test_a_redis_that_does_not_answer_costs_no_hand_back(stack: Stack, client: httpx.Client, second: Worker) -> None:
    run = started(stack, client, Script(stack.model_url, [say("too late", delay_s=30), DONE]))
    stack.valkey.pause()
    try:
        assert seconds_until_gone(stack.worker, signal.SIGTERM) < AT_MOST
        with psycopg.connect(stack.database_url) as connection:
            query = "SELECT status, needs_enqueue FROM runs WHERE id = %s"
            assert connection.execute(query, [run["id"]]).fetchone() == ("queued", True)
    finally:
        stack.valkey.resume()
    second.start()
    assert rest(client, run, seconds=6)["status"] == "succeeded"


def test_a_draining_worker_lives_but_is_not_ready(stack: Stack, client: httpx.Client, second: Worker) -> None:
    worker = stack.worker
    started(stack, client, Script(stack.model_url, [say("late", delay_s=30), DONE]))
    assert httpx.get(f"{worker.address}/health/ready").status_code == 200
    worker.signal(signal.SIGTERM)
    stack.until(lambda: httpx.get(f"{worker.address}/health/ready").status_code == 503, seconds=1)
    assert httpx.get(f"{worker.address}/health/live").status_code == 200


def test_a_job_that_is_put_back_is_found_where_it_was(redis_url: str) -> None:
    queue = RunQueue(redis_url)
    first, second = uuid4(), uuid4()
    queue.enqueue([(first, Priority.NORMAL), (second, Priority.NORMAL)])
    queue.close()
    with connect(redis_url) as connection:
        from rq import Queue

        jobs = JobSource(redis_url, Queue("runs", connection=connection, serializer="json"))
        popped = jobs.pop()
        assert popped is not None
        assert UUID(popped.id) == first
        jobs.put_back(popped)
        assert connection.lrange("rq:queue:runs", 0, -1) == [str(first).encode(), str(second).encode()]
        assert connection.llen("rq:queue:runs:intermediate") == 0
        connection.close()
