"""What a worker tells Prometheus, compared with what Postgres says about the same runs."""

import re
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from psycopg.rows import tuple_row

from app import __version__
from app.devstack.stack import Worker
from app.domain.agent import Agent, OnLimit
from app.domain.build import Build
from app.domain.people import ask_human
from app.domain.review import ReviewKind
from app.domain.run import StopReason
from app.domain.step import ToolState, Usage
from app.domain.tool import Effect, tool
from app.metrics import make_registry
from tests.scripts import DONE, Run, Script, call, calls, rest, say, submit
from tests.stack import Stack
from tests.worker.test_ending import frozen_postgres
from tests.worker.test_people import Play
from worker.metrics import Drop, WorkerMetrics

Labels = tuple[tuple[str, str], ...]
Samples = dict[tuple[str, Labels], float]
Numbers = dict[tuple[str, ...], float]
OURS = "agent_service_"


def read(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(worker: Worker) -> Samples:
    answer = httpx.get(f"{worker.address}/metrics", timeout=10, trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return read(answer.text)


def by(samples: Samples, name: str, *labels: str) -> Numbers:
    """The sum of a metric for each set of values that these labels have; without zeros."""
    found: Numbers = {}
    for (each, of), value in samples.items():
        if each == name and value:
            key = tuple(dict(of)[label] for label in labels)
            found[key] = found.get(key, 0.0) + value
    return found


def total(samples: Samples, name: str, **of: str) -> float:
    """Over all series that have these labels."""
    return sum(
        value for (each, labels), value in samples.items() if each == name and of.items() <= dict(labels).items()
    )


class Count:
    """What a worker has counted since this was made."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._before = scraped(worker)

    def now(self) -> Samples:
        return {name: value - self._before.get(name, 0.0) for name, value in scraped(self._worker).items()}

    def total(self, name: str, **of: str) -> float:
        return total(self.now(), OURS + name, **of)


def slots(worker: Worker) -> tuple[float, float]:
    """Busy, and free."""
    now = scraped(worker)
    return total(now, f"{OURS}worker_slots", state="busy"), total(now, f"{OURS}worker_slots", state="free")


def slow_run(stack: Stack, client: httpx.Client, *, seconds: float, then: int = 1, **more: Any) -> Run:
    """A run whose model is being asked, for so long, and then answers as often as it is asked again."""
    script = Script(stack.model_url, [say("slow", delay_s=seconds), *[DONE] * then])
    run = submit(client, "toolbox", script.input, **more)
    stack.until(script.requests)
    return run


@pytest.fixture
def patient(stack: Stack) -> Iterator[Worker]:
    """The only worker, with leases so long that no heartbeat falls into a test."""
    stack.worker.stop()
    build = {"IMAGE_DIGEST": "sha256:0123", "GIT_REVISION": "4f90d69", "ENVIRONMENT": "staging"}
    worker = stack.another_worker("patient", LEASE_SECONDS="60", **build)
    worker.start()
    yield worker
    worker.stop()
    stack.worker.start()


# -- against Postgres


def test_what_is_counted_is_what_postgres_says(stack: Stack, client: httpx.Client, tenant: str) -> None:
    count = Count(stack.worker)
    everything_happens(stack, client)

    def of_tenant(query: str) -> dict[tuple[str, ...], tuple[float, ...]]:
        """Rows as labels (text) and numbers."""
        with psycopg.connect(stack.database_url, row_factory=tuple_row) as connection:
            rows = connection.execute(query, {"tenant": tenant}).fetchall()
        return {
            tuple(value for value in row if isinstance(value, str)): tuple(
                float(value) for value in row if not isinstance(value, str)
            )
            for row in rows
        }

    runs = of_tenant("SELECT agent, status, stop_reason, count(*) FROM runs WHERE tenant = %(tenant)s GROUP BY 1, 2, 3")
    assert len(runs) == 8, runs
    stack.until(lambda: count.total("runs_ended_total") == sum(number for (number,) in runs.values()))
    now = count.now()

    def compare(name: str, labels: tuple[str, ...], query: str, *, tolerance_s: float = 0.002) -> None:
        """A histogram: how many observations, and their sum. Postgres keeps whole milliseconds of some."""
        expected = of_tenant(query)
        assert by(now, f"{name}_count", *labels) == {labels: number for labels, (number, _) in expected.items()}
        sums = by(now, f"{name}_sum", *labels)
        for of, (number, amount) in expected.items():
            assert sums.get(of, 0.0) == pytest.approx(amount, abs=tolerance_s * number), (name, of)

    assert by(now, f"{OURS}runs_ended_total", "agent", "status", "stop_reason") == {
        labels: number for labels, (number,) in runs.items()
    }
    assert by(now, f"{OURS}runs_escalated_total", "agent") == {
        labels: number
        for labels, (number,) in of_tenant(
            "SELECT agent, count(*) FROM runs WHERE tenant = %(tenant)s AND human_ms > 0 GROUP BY 1"
        ).items()
    }
    compare(
        f"{OURS}run_duration_seconds",
        ("agent", "status"),
        """SELECT agent, status, count(*), sum(extract(epoch FROM ended_at - created_at))
           FROM runs WHERE tenant = %(tenant)s GROUP BY 1, 2""",
    )
    compare(
        f"{OURS}run_execution_seconds",
        ("agent", "status"),
        "SELECT agent, status, count(*), sum(active_ms) / 1000 FROM runs WHERE tenant = %(tenant)s GROUP BY 1, 2",
    )
    compare(
        f"{OURS}run_queue_wait_seconds",
        ("agent",),
        "SELECT agent, sum(attempt), sum(queued_ms) / 1000 FROM runs WHERE tenant = %(tenant)s GROUP BY 1",
    )
    compare(
        f"{OURS}run_steps",
        ("agent",),
        "SELECT agent, count(*), sum(model_calls) FROM runs WHERE tenant = %(tenant)s GROUP BY 1",
    )
    compare(
        f"{OURS}review_wait_seconds",
        ("agent", "kind", "outcome"),
        """SELECT agent, kind, coalesce(decision, 'expired'), count(*),
                  sum(extract(epoch FROM coalesce(decided_at, expires_at) - created_at))
           FROM reviews WHERE tenant = %(tenant)s AND status <> 'void' GROUP BY 1, 2, 3""",
    )

    # -- model calls
    used = of_tenant(
        """SELECT runs.agent, body ->> 'model', count(*), sum((body -> 'usage' ->> 'input_tokens')::int),
                  sum((body -> 'usage' ->> 'output_tokens')::int), sum((body -> 'usage' ->> 'cached_tokens')::int),
                  sum((body ->> 'cost_usd')::numeric)
           FROM steps JOIN runs ON runs.id = run_id WHERE tenant = %(tenant)s AND kind = 'model' GROUP BY 1, 2"""
    )
    of_model = ("gen_ai_agent_name", "gen_ai_request_model")
    for token_type, column in (("input", 1), ("output", 2)):
        of_type = {
            (name, labels): value
            for (name, labels), value in now.items()
            if ("gen_ai_token_type", token_type) in labels
        }
        assert by(of_type, "gen_ai_client_token_usage_count", *of_model) == {
            labels: numbers[0] for labels, numbers in used.items()
        }
        assert by(of_type, "gen_ai_client_token_usage_sum", *of_model) == {
            labels: numbers[column] for labels, numbers in used.items()
        }
    assert by(now, f"{OURS}cached_input_tokens_total", "agent", "model") == {
        labels: numbers[3] for labels, numbers in used.items() if numbers[3]
    }
    assert by(now, f"{OURS}cost_usd_total", "agent", "model") == {
        labels: pytest.approx(numbers[4]) for labels, numbers in used.items()
    }
    tried: Numbers = {(*labels, ""): numbers[0] for labels, numbers in used.items()}
    tried |= {
        ("toolbox", "gpt-5-mini", "ModelUnavailable"): 1,
        ("toolbox", "gpt-5-mini", "ModelRefused"): 1,
        ("toolbox", "gpt-5-mini", "CancelledError"): 1,
        ("with-fallback", "gpt-5", "ModelUnavailable"): 1,
    }
    calls_made = "gen_ai_client_operation_duration_seconds"
    assert by(now, f"{calls_made}_count", *of_model, "error_type") == tried
    of_all = {("chat", "openai"): sum(tried.values())}
    assert by(now, f"{calls_made}_count", "gen_ai_operation_name", "gen_ai_provider_name") == of_all
    took = by(now, f"{calls_made}_sum", "gen_ai_agent_name", "error_type")
    assert SLOW_CALL_SECONDS < took["with-fallback", ""] < SLOW_CALL_SECONDS + 1
    assert by(now, f"{OURS}model_retries_total", "agent", "model") == {("toolbox", "gpt-5-mini"): 1}
    assert by(now, f"{OURS}model_fallbacks_total", "agent", "model") == {("with-fallback", "gpt-5-nano"): 1}

    # -- tool calls
    made_up = ("toolbox", "nobody_has_this", "invalid")
    states = {
        labels: numbers[0]
        for labels, numbers in of_tenant(
            """SELECT runs.agent, body ->> 'tool', state, count(*)
               FROM steps JOIN runs ON runs.id = run_id WHERE tenant = %(tenant)s AND kind = 'tool' GROUP BY 1, 2, 3"""
        ).items()
    }
    assert {state for _, _, state in states} == {"succeeded", "failed", "crashed", "invalid", "rejected"}
    states["toolbox", "other", "invalid"] = states.pop(made_up)
    assert by(now, f"{OURS}tool_calls_total", "agent", "tool", "state") == states
    compare(
        f"{OURS}tool_duration_seconds",
        ("agent", "tool"),
        """SELECT runs.agent, body ->> 'tool', count(*), sum((body ->> 'duration_ms')::int) / 1000.0
           FROM steps JOIN runs ON runs.id = run_id
           WHERE tenant = %(tenant)s AND kind = 'tool' AND state IN ('succeeded', 'failed', 'crashed')
             AND NOT (body ->> 'from_person')::boolean GROUP BY 1, 2""",
        tolerance_s=0.05,
    )


SLOW_CALL_SECONDS = 0.3
USAGE = {"prompt_tokens": 1000, "completion_tokens": 50, "cached_tokens": 400}


def everything_happens(stack: Stack, client: httpx.Client) -> None:
    """Runs that end in all sorts of ways; the last of them has ended when this returns."""

    def begin(agent: str, *replies: dict[str, Any], **more: Any) -> Run:
        return submit(client, agent, Script(stack.model_url, list(replies)).input, **more)

    fallback = Script(stack.model_url, [{"fault": "status:429", "retry_after": "3600"}], model="gpt-5")
    fallback.add([say("done", delay_s=SLOW_CALL_SECONDS)])
    running = slow_run(stack, client, seconds=60)
    runs = [
        begin(
            "toolbox",
            calls(("echo", {"text": "a"}), ("add", {"left": 1}), usage=USAGE),
            call("echo", {"text": "b"}),
            DONE,
        ),
        begin("toolbox", call("echo", {"text": "a"}), limits={"max_steps": 1}),
        begin(
            "toolbox",
            calls(("refuse", {"why": "no"}), ("crash", {}), ("dawdle", {"seconds": 5}), ("nobody_has_this", {})),
            DONE,
        ),
        begin("toolbox", {"fault": "status:500"}, DONE),
        begin("toolbox", {"fault": "status:400"}),
        submit(client, "with-fallback", fallback.input),
        begin("impatient", call("open_the_door")),
    ]
    plays = [
        Play(stack, client, "clerk", [call("announce", {"text": "a"}), DONE]) for _ in ("approve", "edit", "reject")
    ]
    plays[0].decide("approve")
    plays[1].decide("edit", arguments={"text": "b"})
    plays[2].decide("reject", reason="no")
    asked = Play(stack, client, "clerk", [call("ask_human", {"question": "Which?"}), DONE])
    asked.decide("respond", response="that one")
    waiting = Play(stack, client, "clerk", [call("announce", {"text": "a"}), DONE])
    for run in (running, waiting.run):
        assert client.post(f"/v1/runs/{run['id']}/cancel").status_code == 202
    for play in (*plays, asked):
        play.then()
    for run in (*runs, running, waiting.run):
        stack.until(lambda run=run: client.get(f"/v1/runs/{run['id']}").json()["ended_at"])  # type: ignore[misc]


# -- leases and rescues


def test_lease_losses_and_rescues_are_counted_and_cancellations_are_neither(
    stack: Stack, client: httpx.Client, patient: Worker
) -> None:
    count = Count(patient)
    taken = slow_run(stack, client, seconds=1)
    expired = slow_run(stack, client, seconds=60)
    given_up = slow_run(stack, client, seconds=5, limits={"max_attempts": 1})
    overdue = slow_run(stack, client, seconds=60)
    cancelled = slow_run(stack, client, seconds=60)
    with psycopg.connect(stack.owner_url, autocommit=True) as postgres:

        def change(run: Run, what: str) -> None:
            postgres.execute(f"UPDATE runs SET {what} WHERE id = %s", [run["id"]])

        change(taken, "lease_token = gen_random_uuid()")
        change(overdue, "active_ms = 1000000000")
        change(expired, "lease_until = now()")
        change(given_up, "lease_until = now()")
        client.post(f"/v1/runs/{cancelled['id']}/cancel").raise_for_status()
        stack.until(lambda: count.total("lease_losses_total") == 4, seconds=20)
        change(taken, "lease_until = now()")
        assert [rest(client, run)["status"] for run in (taken, expired)] == ["succeeded", "succeeded"]
    assert [rest(client, run)["stop_reason"] for run in (given_up, overdue)] == ["max_attempts", "deadline"]
    stack.until(lambda: count.total("runs_ended_total") == 5)
    now = count.now()
    assert total(now, f"{OURS}lease_losses_total") == 4  # also after a while
    assert by(now, f"{OURS}rescued_runs_total", "outcome") == {("requeued",): 2, ("given_up",): 1, ("overdue",): 1}
    assert by(now, f"{OURS}runs_ended_total", "stop_reason") == {
        ("final_answer",): 2,
        ("max_attempts",): 1,
        ("deadline",): 1,
        ("cancelled",): 1,
    }
    assert total(scraped(patient), f"{OURS}build_info") == 1
    build = {"version": __version__, "image_digest": "sha256:0123", "git_revision": "4f90d69", "environment": "staging"}
    assert total(scraped(patient), f"{OURS}build_info", **build) == 1


def test_a_lease_that_a_heartbeat_finds_gone_is_counted_and_a_run_that_was_cancelled_unheard_is_not(
    stack: Stack, client: httpx.Client
) -> None:
    count = Count(stack.worker)
    taken, cancelled = slow_run(stack, client, seconds=60), slow_run(stack, client, seconds=60)
    with psycopg.connect(stack.owner_url, autocommit=True) as postgres:
        postgres.execute(
            """UPDATE runs SET status = 'cancelled', stop_reason = 'cancelled', ended_at = now(),
                               lease_token = NULL, lease_until = NULL, running_since = NULL WHERE id = %s""",
            [cancelled["id"]],
        )
        stack.until(lambda: slots(stack.worker)[0] == 1)
        assert count.total("lease_losses_total") == 0
        postgres.execute("UPDATE runs SET lease_token = gen_random_uuid() WHERE id = %s", [taken["id"]])
        stack.until(lambda: count.total("lease_losses_total") == 1)
        postgres.execute("UPDATE runs SET lease_until = now() WHERE id = %s", [taken["id"]])
    assert rest(client, taken)["status"] == "succeeded"


# -- the process


def test_busy_and_free_slots_are_right_also_while_redis_is_away_and_when_it_is_back(
    stack: Stack, client: httpx.Client
) -> None:
    stack.until(lambda: slots(stack.worker) == (0, 100))
    runs = [slow_run(stack, client, seconds=2) for _ in range(2)]
    assert slots(stack.worker) == (2, 98)
    stack.valkey.kill()
    try:
        stack.until(lambda: "Redis is away" in stack.worker.tail(5), seconds=15)
        assert [rest(client, run)["status"] for run in runs] == ["succeeded", "succeeded"]
    finally:
        stack.valkey.start()
    stack.until(lambda: slots(stack.worker) == (0, 100))
    again = slow_run(stack, client, seconds=1)
    assert slots(stack.worker) == (1, 99)
    rest(client, again)


def test_a_worker_that_drains_is_scraped_and_has_no_free_slot(stack: Stack, client: httpx.Client) -> None:
    slow_run(stack, client, seconds=2)
    stack.worker.signal(15)
    stack.until(lambda: slots(stack.worker) == (1, 0), seconds=2)
    assert stack.worker.wait(10) == 0


def test_a_scrape_waits_for_neither_postgres_nor_redis(stack: Stack) -> None:
    def seconds() -> float:
        began = time.monotonic()
        scraped(stack.worker)
        return time.monotonic() - began

    usual = seconds()
    with frozen_postgres(stack):
        stack.valkey.pause()
        try:
            time.sleep(2.5)  # for whatever is to be stuck
            assert seconds() < 1 + 3 * usual
        finally:
            stack.valkey.resume()


def test_an_event_loop_that_is_held_up_is_seen(stack: Stack, client: httpx.Client) -> None:
    count = Count(stack.worker)
    stack.until(lambda: count.total("event_loop_lag_seconds_count") >= 2)
    assert count.total("event_loop_lag_seconds_sum") < 0.5
    script = Script(stack.model_url, [call("hold_the_loop", {"seconds": 1.2}), DONE])
    rest(client, submit(client, "toolbox", script.input))
    stack.until(lambda: count.total("event_loop_lag_seconds_sum") > 0.8)
    now = count.now()
    lag = f"{OURS}event_loop_lag_seconds"
    assert total(now, f"{lag}_count") - total(now, f"{lag}_bucket", le="0.5") == 1


# -- names and labels


@tool
async def look(text: str) -> str:
    """Look."""
    return text


@tool(approval=True, effect=Effect.ONCE)
async def send(text: str) -> str:
    """Send."""
    return text


WRITER = Agent(
    name="writer",
    instructions="Write.",
    tools=(look, send, ask_human),
    model="large",
    fallback_models=("small",),
    on_limit=OnLimit.ESCALATE,
)
READER = Agent(name="reader", instructions="Read.", tools=(look,), model="small")


def made() -> WorkerMetrics:
    agents = {"writer": WRITER, "reader": READER}
    return WorkerMetrics(make_registry(Build()), agents, model=None)


def counted(metrics: WorkerMetrics) -> Samples:
    return {name: value for name, value in read(metrics.text().decode()).items() if value}


def test_what_is_known_beforehand_begins_at_zero() -> None:
    metrics = made()
    metrics.watch_back_ends(["langfuse"])
    begun = read(metrics.text().decode())

    def series(name: str, *labels: str) -> set[tuple[str, ...]]:
        """Of the writer, or of no agent."""
        of_name = [dict(of) for each, of in begun if each in (OURS + name, name)]
        named = ("agent", "gen_ai_agent_name")
        return {tuple(of[label] for label in labels) for of in of_name if "reader" not in map(of.get, named)}

    assert series("runs_ended_total", "agent", "status", "stop_reason") == {
        ("writer", reason.status, reason) for reason in StopReason
    }
    assert series("tool_calls_total", "tool", "state") == {
        (name, state) for name in ("look", "send", "ask_human") for state in ToolState
    }
    assert series("tool_duration_seconds_count", "tool") == {("look",), ("send",)}
    assert series("review_wait_seconds_count", "kind", "outcome") == {(kind, "expired") for kind in ReviewKind}
    assert not [of for name, of in begun if name.startswith(f"{OURS}review_wait") and ("agent", "reader") in of]
    for name in ("cost_usd_total", "cached_input_tokens_total", "model_retries_total", "model_fallbacks_total"):
        assert series(name, "agent", "model") == {("writer", "large"), ("writer", "small")}
    assert series("gen_ai_client_operation_duration_seconds_count", "gen_ai_request_model", "error_type") == {
        ("large", ""),
        ("small", ""),
    }
    assert series("gen_ai_client_token_usage_count", "gen_ai_request_model", "gen_ai_token_type") == {
        (model, token_type) for model in ("large", "small") for token_type in ("input", "output")
    }
    for name in ("run_duration_seconds_count", "run_execution_seconds_count"):
        assert series(name, "agent", "status") == {("writer", "succeeded")}
    for name in ("run_queue_wait_seconds_count", "run_steps_count"):
        assert series(name, "agent") == {("writer",)}
    assert series("rescued_runs_total", "outcome") == {("requeued",), ("given_up",), ("overdue",)}
    assert series("lease_losses_total") == {()}
    assert series("telemetry_sent_total", "back_end") == {("langfuse",)}
    assert series("telemetry_dropped_total", "reason") == {("queue_full",), ("failed",), ("ended",)}
    assert ("process_resident_memory_bytes", ()) in begun
    counters = {value for (name, _), value in begun.items() if name.startswith(("agent_service", "gen_ai"))}
    assert counters == {0.0, 1.0}  # the build


def test_buckets_reach_from_what_is_quick_to_what_is_too_slow() -> None:
    bounds: dict[str, list[float]] = {}
    for name, labels in read(made().text().decode()):
        if name.endswith("_bucket") and (bound := dict(labels)["le"]) != "+Inf":
            bounds.setdefault(name.removesuffix("_bucket").removeprefix(OURS), []).append(float(bound))
    hour, day = 3600, 24 * 3600
    assert {name: (min(found), max(found)) for name, found in bounds.items()} == {
        "run_duration_seconds": (0.1, day),
        "run_execution_seconds": (0.1, day),
        "run_queue_wait_seconds": (0.005, hour / 6),
        "run_steps": (1, 100),
        "tool_duration_seconds": (0.005, 300),
        "review_wait_seconds": (10, 7 * day),
        "gen_ai_client_token_usage": (1, 4**13),
        "gen_ai_client_operation_duration_seconds": (0.01, 81.92),
        "event_loop_lag_seconds": (0.001, 10),
    }


def test_spans_are_counted_by_back_end() -> None:
    metrics = made()
    metrics.spans_sent("langfuse", 3)
    metrics.spans_dropped("phoenix", Drop.QUEUE_FULL, 2)
    now = counted(metrics)
    assert by(now, f"{OURS}telemetry_sent_total", "back_end") == {("langfuse",): 3}
    assert by(now, f"{OURS}telemetry_dropped_total", "back_end", "reason") == {("phoenix", "queue_full"): 2}


def test_what_this_worker_does_not_know_makes_no_series_of_its_own() -> None:
    metrics = made()
    for number in range(5):
        metrics.tool_called("writer", f"tool-{number}", ToolState.INVALID, 0.0)
        metrics.tool_called(f"agent-{number}", "look", ToolState.SUCCEEDED, 0.1)
        metrics.model_retried("writer", f"model-{number}")
        metrics.model_fell_back("writer", f"model-{number}")
        metrics.model_called(
            f"agent-{number}", "large", 0.1, usage=Usage(input_tokens=1), cost_usd=Decimal(1), error=None
        )
        metrics.model_called("writer", "large", 0.1, usage=None, cost_usd=None, error=f"Error{number}")
    text = metrics.text().decode()
    assert not re.search(r"(tool|agent|model)-\d|Error\d", text)
    now = counted(metrics)
    assert by(now, f"{OURS}tool_calls_total", "agent", "tool", "state") == {
        ("writer", "other", "invalid"): 5,
        ("other", "other", "succeeded"): 5,
    }
    assert by(now, f"{OURS}model_retries_total", "agent", "model") == {("writer", "other"): 5}
    assert by(now, f"{OURS}model_fallbacks_total", "agent", "model") == {("writer", "other"): 5}
    assert by(now, f"{OURS}cost_usd_total", "agent", "model") == {("other", "other"): 5}
    assert by(now, "gen_ai_client_operation_duration_seconds_count", "gen_ai_request_model", "error_type") == {
        ("other", ""): 5,
        ("large", "other"): 5,
    }


def test_no_label_names_a_tenant_or_a_run(stack: Stack, client: httpx.Client, tenant: str) -> None:
    run = submit(client, "toolbox", Script(stack.model_url, [DONE]).input)
    rest(client, run)
    text = httpx.get(f"{stack.worker.address}/metrics", trust_env=False).text
    assert tenant not in text
    assert run["id"] not in text
