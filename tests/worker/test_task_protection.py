"""Is a worker spared by ECS while it has runs? Its agent is a server over loopback."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from app.background import in_background
from app.devstack.ports import LOOPBACK
from app.devstack.stack import Worker
from tests.scripts import DONE, Script, call, rest, submit
from tests.stack import Stack
from worker.task_protection import Pace, TaskProtection

QUICK = Pace(look=0.01, idle=0.2, renew=0.3, longest=60, pause=0.3, retry=0.05, patience=0.3)
PROTECT = {"ProtectionEnabled": True, "ExpiresInMinutes": 10}
LET_GO = {"ProtectionEnabled": False}


class Agent(ThreadingHTTPServer):
    """`asked`: when, with what. `answer`: status and body for what it is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((LOOPBACK, 0), _Handler)
        self.asked: list[tuple[float, dict[str, object]]] = []
        self.answer: Callable[[dict[str, object]], tuple[int, object]] = lambda asked: (200, {"protection": asked})

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/api/8d5d"

    @property
    def wishes(self) -> list[dict[str, object]]:
        return [wish for _, wish in self.asked]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Agent

    def do_PUT(self) -> None:
        assert self.path == "/api/8d5d/task-protection/v1/state"
        wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((time.monotonic(), wish))
        status, answer = self.server.answer(wish)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the library
        """Nothing: what matters is what was asked."""


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent() as agent:
        threading.Thread(target=agent.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield agent
        finally:
            agent.shutdown()


@contextmanager
def a_worker(stack: Stack, **env: str) -> Iterator[Worker]:
    """The only one."""
    stack.worker.stop()
    worker = stack.another_worker("on-ecs", **env)
    try:
        worker.start()
        yield worker
    finally:
        worker.stop()
        stack.worker.start()


def test_a_worker_is_protected_from_its_first_run_until_it_has_had_none_for_a_while(
    stack: Stack, client: httpx.Client, agent: Agent
) -> None:
    with a_worker(stack, ECS_AGENT_URI=agent.address):
        time.sleep(1)
        assert agent.wishes == []
        began = time.monotonic()
        runs = [
            submit(client, "toolbox", Script(stack.model_url, [call("rest", {"seconds": 2}), DONE]).input)
            for _ in range(3)
        ]
        stack.until(lambda: agent.wishes)
        assert agent.asked[0][0] - began < 1.5
        for run in runs:
            assert rest(client, run)["status"] == "succeeded"
        ended = time.monotonic()
        stack.until(lambda: len(agent.wishes) > 1)
    assert agent.wishes == [PROTECT, LET_GO]
    assert 3 < agent.asked[1][0] - ended < 8


def test_an_agent_that_refuses_or_is_away_changes_nothing_for_the_runs(stack: Stack, client: httpx.Client) -> None:
    with a_worker(stack, ECS_AGENT_URI=f"http://{LOOPBACK}:9/api/8d5d") as worker:
        run = submit(client, "toolbox", Script(stack.model_url, [call("rest", {"seconds": 1}), DONE]).input)
        assert rest(client, run)["status"] == "succeeded"
        assert worker.is_running
    assert "task protection failed" in worker.log.read_text()


def test_elsewhere_nobody_is_asked(stack: Stack, client: httpx.Client, agent: Agent) -> None:
    with a_worker(stack, ECS_AGENT_URI=""):
        run = submit(client, "toolbox", Script(stack.model_url, [DONE]).input)
        assert rest(client, run)["status"] == "succeeded"
    assert agent.asked == []


# -- in a hurry


class Busy:
    """How many runs a worker has."""

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def __call__(self) -> int:
        return self.runs


def during(agent: Agent, pace: Pace, *runs: tuple[int, float]) -> list[dict[str, object]]:
    """What is asked while a worker has so many runs for so many seconds, and then so many."""

    async def watch() -> None:
        busy = Busy(0)
        async with in_background(TaskProtection(agent.address, busy, pace).keep()) as keeping:
            for busy.runs, seconds in runs:
                await asyncio.sleep(seconds)
            assert not keeping.done()

    asyncio.run(watch())
    return agent.wishes


def paced(**differently: float) -> Pace:
    return Pace(**{name: getattr(QUICK, name) for name in Pace.__slots__} | differently)


def test_a_protection_is_renewed_while_there_are_runs(agent: Agent) -> None:
    assert during(agent, QUICK, (1, 1.0)) == [PROTECT] * 4


def test_runs_that_follow_each_other_closely_ask_only_once(agent: Agent) -> None:
    assert during(agent, paced(renew=60), *[(1, 0.05), (0, 0.05)] * 8) == [PROTECT]


def test_a_worker_that_always_has_runs_lets_a_release_pass_from_time_to_time(agent: Agent) -> None:
    during(agent, paced(renew=60, longest=0.5, pause=0.4), (5, 1.2))
    assert agent.wishes == [PROTECT, LET_GO, PROTECT]
    first, let_go, again = (at for at, _ in agent.asked)
    assert let_go - first >= 0.45
    assert again - let_go >= 0.35


def test_renewing_does_not_put_that_off(agent: Agent) -> None:
    assert LET_GO in during(agent, paced(renew=0.2, longest=0.5, pause=60), (5, 1.2))


def test_a_worker_that_was_idle_is_protected_again_at_once(agent: Agent) -> None:
    during(agent, paced(renew=60, pause=60), (1, 0.1), (0, 0.5), (1, 0.2))
    assert agent.wishes == [PROTECT, LET_GO, PROTECT]


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (200, {"failure": {"Reason": "DEPLOYMENT_BLOCKED"}}),  # which does come with 200
        (200, {"protection": {"ProtectionEnabled": False}}),
        (200, "?"),
        (400, {"error": {"Code": "AccessDeniedException"}}),
    ],
)
def test_what_was_refused_is_asked_again_a_little_later(
    agent: Agent, caplog: pytest.LogCaptureFixture, status: int, answer: object
) -> None:
    refusals = 3

    def refuse(wish: dict[str, object]) -> tuple[int, object]:
        return (status, answer) if len(agent.asked) <= refusals else (200, {"protection": wish})

    agent.answer = refuse
    assert during(agent, paced(renew=60), (1, 0.6)) == [PROTECT] * (refusals + 1)
    assert agent.asked[-1][0] - agent.asked[0][0] >= refusals * 0.8 * QUICK.retry
    assert [record.message for record in caplog.records if record.name == "worker.task_protection"] == [
        "task protection failed"
    ] * refusals


def test_an_agent_that_keeps_silent_is_not_waited_for(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    def keep_silent(wish: dict[str, object]) -> tuple[int, object]:
        time.sleep(2 if len(agent.asked) == 1 else 0)
        return 200, {"protection": wish}

    agent.answer = keep_silent
    assert during(agent, paced(renew=60), (1, 0.8)) == [PROTECT, PROTECT]
    assert "TimeoutError" in str([vars(record).get("fields") for record in caplog.records])
