"""One story of a run, lived once for all the tests here.

phoenix  the server, empty at first
service  the API, and a way to start workers that send it their spans
story    a run in whose way everything came, and its trace
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest

from app.devstack.access import make_key
from app.devstack.processes import Reaper
from app.devstack.stack import Worker
from tests.phoenix.server import Phoenix, Trace
from tests.scripts import Run, Script, call, calls, rest, say, steps_of, submit
from tests.stack import Stack, new_directory

NANO = "gpt-5-nano"
SECRET = "sk-proj-4f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a"
E_MAIL = "ada@example.com"


@dataclass(frozen=True)
class Service:
    """`worker`: a new one, not yet started."""

    stack: Stack
    client: httpx.Client
    worker: Callable[[], Worker]


@dataclass(frozen=True)
class Story:
    """`run`, `steps`: as the API tells them. `workers`: the processes that had the run, in order."""

    run: Run
    steps: list[Run]
    trace: Trace


@pytest.fixture(scope="session")
def phoenix(reaper: Reaper) -> Iterator[Phoenix]:
    """Not waited for: it takes longer to start than the stack."""
    with new_directory() as directory:
        server = Phoenix(directory / "phoenix", reaper=reaper)
        server.spawn()
        try:
            yield server
        finally:
            server.close()


@pytest.fixture(scope="session")
def service(phoenix: Phoenix, servers: Stack) -> Iterator[Service]:
    ours = {"AGENTS": "tests.phoenix.agents", "PHOENIX_COLLECTOR_ENDPOINT": phoenix.address}
    key = make_key(servers.database_url, tenant="phoenix", name="test")
    with ExitStack() as stack:

        def worker() -> Worker:
            made = servers.another_worker(f"worker-{len(workers)}", **ours)
            workers.append(made)
            stack.callback(made.stop)
            return made

        workers: list[Worker] = []
        api = servers.another_api("api-with-phoenix", **ours)
        stack.callback(api.stop)
        api.start()
        client = httpx.Client(
            base_url=api.address, headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False, verify=False
        )
        phoenix.wait_ready()
        yield Service(servers, stack.enter_context(client), worker)


def fails(status: int, **more: str) -> dict[str, object]:
    return {"fault": f"status:{status}", **more}


def used(prompt: int, completion: int, cached: int = 0) -> dict[str, object]:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion, "cached_tokens": cached}}


@pytest.fixture(scope="session")
def story(phoenix: Phoenix, service: Service) -> Story:
    """A failed call made again, tools, one of which fails, a second model, a person, a crash, and an answer."""
    stack, client = service.stack, service.client
    tools = calls(("echo", {"text": f"for {E_MAIL}"}), ("refuse", {"why": "it is locked"}), **used(2000, 40, 1024))
    replies = [
        fails(503),
        tools,
        fails(429, retry_after="3600"),
        say("never heard", delay_s=60),
        say("brought", **used(2500, 10, 2048)),
    ]
    script = Script(stack.model_url, replies)
    script.add([call("open_the_door", **used(2200, 20))], model=NANO)
    first, second = service.worker(), service.worker()

    first.start()
    accepted = submit(
        client, "courier", f"{script.input} with {SECRET}", metadata={"user_id": "u-1", "session_id": "s-1"}
    )
    waiting = rest(client, accepted)
    assert waiting["status"] == "waiting", waiting
    [review] = client.get("/v1/reviews").json()["data"]
    decision = {"decision": "approve", "args_hash": review["args_hash"], "reason": "let it in"}
    client.post(f"/v1/reviews/{review['id']}/decision", json=decision).raise_for_status()
    stack.until(lambda: len(script.requests()) == 4, seconds=20)
    stack.until(lambda: "execute_tool open_the_door" in names(phoenix, accepted), seconds=20)
    first.kill()
    second.start()
    run = rest(client, accepted)
    assert run["status"] == "succeeded", run
    root = f"invoke_agent {run['agent']}"
    stack.until(lambda: root in names(phoenix, accepted), seconds=20)
    trace = phoenix.trace(run["trace_id"])
    assert trace is not None
    return Story(run, steps_of(client, run), trace)


def names(phoenix: Phoenix, run: Run) -> list[str]:
    trace = phoenix.trace(run["trace_id"])
    return trace.names if trace else []
