"""RQ's own tools on our worker."""

import subprocess
import sys

import httpx
import redis

from tests.scripts import DONE, Script, audit_of, call, rest, say, submit
from tests.stack import Stack


def rq(stack: Stack, *command: str) -> str:
    line = [sys.executable, "-m", "rq.cli", *command, "--url", stack.redis_url]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def state_of_worker(stack: Stack) -> str:
    """As `rq info` shows it: idle, busy, suspended."""
    [line] = [line for line in stack.rq_info().splitlines() if f" {stack.worker.pid})" in line]
    return line.partition("): ")[2].split()[0]


def test_a_suspended_worker_takes_nothing_and_goes_on_when_resumed(stack: Stack, client: httpx.Client) -> None:
    rq(stack, "suspend")
    try:
        stack.until(lambda: state_of_worker(stack) == "suspended")
        run = submit(client, "toolbox", Script(stack.model_url, [DONE]).input)
        stack.pause()
        assert client.get(f"/v1/runs/{run['id']}", params={"wait": 2}).json()["status"] == "queued"
    finally:
        rq(stack, "resume")
    assert rest(client, run)["status"] == "succeeded"


def test_the_worker_is_busy_while_runs_are_executed_and_idle_after(stack: Stack, client: httpx.Client) -> None:
    script = Script(stack.model_url, [say("slow", delay_s=2)])
    run = submit(client, "toolbox", script.input)
    stack.until(script.requests)
    assert state_of_worker(stack) == "busy"
    rest(client, run)
    stack.until(lambda: state_of_worker(stack) == "idle")


def test_stop_job_cancels_any_of_the_runs_in_execution(stack: Stack, client: httpx.Client) -> None:
    scripts = [Script(stack.model_url, [say("slow", delay_s=3)]) for _ in range(3)]
    runs = [submit(client, "toolbox", script.input) for script in scripts]
    for script in scripts:
        stack.until(script.requests)
    with redis.Redis.from_url(stack.redis_url) as connection:
        from rq.command import send_stop_job_command

        send_stop_job_command(connection, runs[1]["id"], serializer="json")
    assert rest(client, runs[1], seconds=2)["status"] == "cancelled"
    assert audit_of(client, runs[1])[-1] == "run.cancelled"
    assert [rest(client, run)["status"] for run in (runs[0], runs[2])] == ["succeeded", "succeeded"]


def test_nothing_is_left_in_redis_of_runs_that_ended(stack: Stack, client: httpx.Client) -> None:
    replies = [call("echo", {"text": "a"}), DONE]
    runs = [submit(client, "toolbox", Script(stack.model_url, replies).input) for _ in range(10)]
    assert {rest(client, run)["status"] for run in runs} == {"succeeded"}
    with redis.Redis.from_url(stack.redis_url, decode_responses=True) as connection:

        def left() -> list[str]:
            names = [str(key) for key in connection.scan_iter("rq:*")]
            return [name for name in names for run in runs if run["id"] in name]

        stack.until(lambda: not left())
        assert connection.zcard("rq:failed:runs") == 0
        assert connection.llen("rq:queue:runs:intermediate") == 0


def test_a_run_whose_job_redis_has_lost_is_executed_all_the_same(stack: Stack, client: httpx.Client) -> None:
    stack.worker.stop()
    run = submit(client, "toolbox", Script(stack.model_url, [DONE]).input)
    with redis.Redis.from_url(stack.redis_url) as connection:
        stack.until(lambda: connection.llen("rq:queue:runs"))
        connection.delete(f"rq:job:{run['id']}")
    stack.worker.start()
    assert rest(client, run, seconds=4)["status"] == "succeeded"


def test_a_worker_that_redis_forgot_registers_again(stack: Stack) -> None:
    stack.flush_redis()
    stack.until(lambda: state_of_worker_or_nothing(stack) == "idle")


def state_of_worker_or_nothing(stack: Stack) -> str:
    try:
        return state_of_worker(stack)
    except ValueError:
        return ""
