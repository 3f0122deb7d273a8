"""A whole worker and all four tracing back ends: that each is given every run whole, and that none can hold up any."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx

from app.devstack.stack import Worker
from tests.otlp import KINDS, BackEnd, Kind, Mode, Span, all_four, settings_of
from tests.scripts import DONE, Run, Script, call, rest, submit
from tests.stack import Stack

DRAIN_SECONDS = 4.0
RUNS = 20


@contextmanager
def worker_for(stack: Stack, **settings: str) -> Iterator[Worker]:
    """One worker, in the place of the stack's own."""
    stack.worker.stop()
    worker = stack.another_worker("traced", DRAIN_SECONDS=str(DRAIN_SECONDS), **settings)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def submit_some(stack: Stack, client: httpx.Client, how_many: int = RUNS) -> list[Run]:
    scripts = [Script(stack.model_url, [call("echo", {"text": "x"}), DONE]) for _ in range(how_many)]
    return [submit(client, "toolbox", script.input) for script in scripts]


def count(worker: Worker, name: str, **labels: str) -> float:
    """What the worker's `/metrics` says, summed up over the labels that are not given."""
    text = httpx.get(f"{worker.address}/metrics", trust_env=False, verify=False).text
    found = re.findall(rf"^{name}{{(.*)}} (.*)$", text, re.MULTILINE)
    wanted = {f'{label}="{value}"' for label, value in labels.items()}
    return sum(float(value) for given, value in found if wanted <= set(given.split(",")))


def shape(spans: list[Span]) -> set[tuple[str, str, str | None]]:
    return {(span.name, span.span_id, span.parent_id) for span in spans}


def test_all_four_are_given_the_same_whole_runs_also_at_the_end(stack: Stack, client: httpx.Client) -> None:
    with all_four() as four, worker_for(stack, **settings_of(four)) as worker:
        runs = [rest(client, run) for run in submit_some(stack, client, 3)]
        for run in runs:
            assert run["status"] == "succeeded"
            first, *others = [shape(four[kind].until_root(run["id"])) for kind in KINDS]
            assert sorted(name for name, _, _ in first) == [
                "chat gpt-5-mini",
                "chat gpt-5-mini",
                "execute_tool echo",
                "invoke_agent toolbox",
                "queued",
            ]
            assert all(other == first for other in others)
            (score,) = four["langfuse"].until_scores(run["id"], 1)
            assert (score["name"], score["value"]) == ("succeeded", 1)
        # A run that an earlier test has left may be among them.
        stack.until(lambda: count(worker, "agent_service_telemetry_sent_total") == taken(four) >= 3 * (4 * 5 + 1))
        assert count(worker, "agent_service_telemetry_dropped_total") == 0

        # What has just ended is still on its way.
        runs = [rest(client, run) for run in submit_some(stack, client)]
        worker.stop()
        for back_end in four.values():
            for run in runs:
                assert len(back_end.spans(run["id"])) == 5
        assert all(len(four["langfuse"].scores(run["id"])) == 1 for run in runs)


def taken(four: Mapping[Kind, BackEnd]) -> int:
    """Spans and scores that have arrived."""
    return sum(len(back_end.spans()) for back_end in four.values()) + len(four["langfuse"].scores())


def test_four_back_ends_that_hang_hold_up_neither_runs_nor_the_end(stack: Stack, client: httpx.Client) -> None:
    with all_four(Mode.HANG) as four, worker_for(stack, **settings_of(four)) as worker:
        for run in submit_some(stack, client):
            ended = rest(client, run)
            assert ended["status"] == "succeeded"
        for back_end in four.values():
            back_end.until_requests(1)
        for kind in four:
            stack.until(
                lambda kind=kind: count(  # type: ignore[misc]
                    worker, "agent_service_telemetry_dropped_total", back_end=kind, reason="failed"
                ),
                seconds=20,
            )

        script = Script(stack.model_url, [call("rest", {"seconds": 60}), DONE])
        unfinished = submit(client, "toolbox", script.input)
        stack.until(script.requests)
        worker.signal(worker.stop_signal)
        began = time.monotonic()
        assert worker.wait(20) == 0
        assert time.monotonic() - began < DRAIN_SECONDS + 0.5
        assert client.get(f"/v1/runs/{unfinished['id']}").json()["status"] == "queued"
        client.post(f"/v1/runs/{unfinished['id']}/cancel").raise_for_status()

        log = worker.log.read_text()
        assert log.count('"reason": "ended"') == 4
        for back_end in four.values():
            assert not any(value in log for name, value in back_end.settings.items() if name.endswith("KEY"))


def test_a_worker_does_not_start_with_half_a_back_end(servers: Stack) -> None:
    worker = servers.another_worker("half", LANGFUSE_SECRET_KEY="hunter2")
    worker.spawn()
    assert worker.wait(20) == 2
    log = worker.log.read_text()
    assert log.startswith("agent-service: LANGFUSE_SECRET_KEY is malformed: ")
    assert "hunter2" not in log
