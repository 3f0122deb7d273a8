"""Runs and their tenant's budget: many at once never spend more, and whatever happens to a call, nothing stays
reserved."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal

import httpx
import pytest

from app.db import rescue
from app.db.engine import make_engine
from app.devstack.stack import Worker
from tests.scripts import DONE, Reply, Run, Script, call, calls, rest, say, steps_of, submit
from tests.spending import give_budget, recorded, rows, stand
from tests.stack import Stack

NOTHING = Decimal(0)
USAGE = {"prompt_tokens": 200, "completion_tokens": 2_000}
COST = Decimal("0.00405")
"""Of a call with this usage, to gpt-5-mini."""
MOST = Decimal("0.0095")
"""The agent `bench` reserves a little less than this for each of its calls here: 4,096 tokens that it may answer."""
NO_ROOM = (
    "What is left of the tenant's budget for today is not enough for the next model call;"
    " the budget is renewed at midnight UTC."
)

Standing = Callable[[], tuple[Decimal, Decimal]]


@pytest.fixture
def standing(stack: Stack, tenant: str) -> Standing:
    """What is spent and reserved."""
    return lambda: stand(stack.database_url, tenant)


def turns(how_many: int, **more: object) -> list[Reply]:
    """So many model calls."""
    asked = [call("echo", {"text": str(turn)}, usage=USAGE, **more) for turn in range(how_many - 1)]
    return [*asked, say("done", usage=USAGE, **more)]


def play(stack: Stack, client: httpx.Client, replies: list[Reply], agent: str = "bench", **more: object) -> Run:
    return submit(client, agent, Script(stack.model_url, replies).input, **more)


@contextmanager
def more_workers(stack: Stack, how_many: int) -> Iterator[list[Worker]]:
    workers = [stack.another_worker(f"worker-{number}") for number in range(how_many)]
    try:
        for worker in workers:
            worker.start()
        yield workers
    finally:
        for worker in workers:
            if worker.is_running:
                worker.resume()
                worker.stop()


def reserve_elsewhere(stack: Stack, tenant: str, usd: str) -> None:
    """As if another run's call were under way."""
    statement = "UPDATE budgets SET reserved_usd = reserved_usd + %s WHERE tenant = %s RETURNING tenant"
    rows(stack.database_url, statement, Decimal(usd), tenant)


@contextmanager
def in_a_call(stack: Stack, client: httpx.Client, tenant: str, *, seconds: float = 60) -> Iterator[Run]:
    """A run whose first model call is under way; its next one is answered at once."""
    give_budget(stack.database_url, tenant, "1")
    script = Script(stack.model_url, [say("late", delay_s=seconds), say("done", usage=USAGE)])
    run = submit(client, "bench", script.input)
    stack.until(script.requests)
    assert stand(stack.database_url, tenant)[1] > 0
    yield run


# -- many at once


@pytest.mark.parametrize("workers", [1, 2])
def test_fifty_concurrent_runs_of_a_tenant_never_spend_more_than_its_budget(
    stack: Stack, client: httpx.Client, tenant: str, standing: Standing, workers: int
) -> None:
    daily = 100 * COST  # of the 200 calls that the runs would make
    give_budget(stack.database_url, tenant, str(daily))

    def one_of_many(number: int) -> Run:
        first, *others = turns(number % 7 + 1, delay_s=0.05)
        return play(stack, client, [{**first, "delay_s": 3}, *others])

    with more_workers(stack, workers - 1):
        with ThreadPoolExecutor(10) as threads:  # all are accepted before the first of them has spent anything
            runs = list(threads.map(one_of_many, range(50)))
        ended = [rest(client, run, seconds=60) for run in runs]
        executed_by = rows(stack.database_url, "SELECT DISTINCT worker FROM runs WHERE tenant = %s", tenant)
    spent = recorded(stack.database_url, tenant)
    assert spent <= daily + COST
    assert spent <= daily
    assert spent > daily - MOST
    assert standing() == (spent, NOTHING)
    ends = Counter(run["stop_reason"] for run in ended)
    assert set(ends) == {"final_answer", "budget"}
    assert min(ends.values()) > 5
    assert len(executed_by) == workers


def test_a_run_waits_while_others_have_reserved_what_is_left(
    stack: Stack, client: httpx.Client, tenant: str, standing: Standing
) -> None:
    give_budget(stack.database_url, tenant, "0.02")  # for two calls at a time
    runs = [play(stack, client, turns(1, delay_s=0.3)) for _ in range(3)]
    assert [rest(client, run)["status"] for run in runs] == ["succeeded"] * 3
    assert standing() == (3 * COST, NOTHING)


# -- not enough


def test_a_run_ends_before_the_call_that_might_cost_more_than_is_left(
    stack: Stack, client: httpx.Client, tenant: str, standing: Standing
) -> None:
    give_budget(stack.database_url, tenant, "0.01")
    run = rest(client, play(stack, client, turns(3)))
    assert (run["status"], run["stop_reason"], run["error"]) == ("failed", "budget", NO_ROOM)
    assert run["usage"]["model_calls"] == 1
    assert len(steps_of(client, run)) == 2
    assert standing() == (COST, NOTHING)


def test_a_budget_that_comes_while_a_run_is_queued_holds_for_it(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    stack.worker.stop()
    priced, unpriced = play(stack, client, [DONE]), play(stack, client, [DONE], "free")
    give_budget(stack.database_url, tenant, "0.001")
    stack.worker.start()
    assert rest(client, priced)["error"] == NO_ROOM
    assert rest(client, priced)["stop_reason"] == "budget"
    assert rest(client, unpriced)["stop_reason"] == "budget"
    assert rest(client, unpriced)["error"] == "The tenant has a budget, and a model of this agent has no price."


def test_whoever_waits_for_room_in_vain_ends_at_its_deadline(
    stack: Stack, client: httpx.Client, tenant: str, standing: Standing
) -> None:
    give_budget(stack.database_url, tenant, "0.01", reserved="0.005")
    run = rest(client, play(stack, client, [DONE], limits={"deadline_s": 0.5}))
    assert (run["stop_reason"], run["usage"]["model_calls"]) == ("deadline", NOTHING)
    assert standing() == (NOTHING, Decimal("0.005"))


def test_whoever_waits_for_room_is_cancelled_at_once(stack: Stack, client: httpx.Client, tenant: str) -> None:
    give_budget(stack.database_url, tenant, "0.01", reserved="0.005")
    run = play(stack, client, [DONE])
    stack.until(lambda: client.get(f"/v1/runs/{run['id']}").json()["status"] == "running")
    client.post(f"/v1/runs/{run['id']}/cancel")
    assert rest(client, run)["status"] == "cancelled"
    give_budget(stack.database_url, tenant, "1")
    time.sleep(1.5)
    assert recorded(stack.database_url, tenant) == 0
    assert stand(stack.database_url, tenant) == (NOTHING, NOTHING)


def test_a_worker_that_goes_away_hands_back_at_once_what_waits_for_room(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    give_budget(stack.database_url, tenant, "0.01", reserved="0.005")
    run = play(stack, client, [DONE])
    stack.until(lambda: client.get(f"/v1/runs/{run['id']}").json()["status"] == "running")
    began = time.monotonic()
    stack.worker.stop()
    took = time.monotonic() - began
    assert client.get(f"/v1/runs/{run['id']}").json()["status"] == "queued"
    give_budget(stack.database_url, tenant, "0.01")
    stack.worker.start()
    assert rest(client, run)["status"] == "succeeded"
    assert took < 2  # of the 4 seconds that it has to drain; the longest pause is one


# -- nothing stays reserved


async def _rescue(database_url: str) -> int:
    engine = make_engine(database_url, pool_size=1, application_name="test")
    try:
        async with engine.connect() as connection:
            requeued, _ = await rescue.rescue_expired(connection, limit=100)
            return len(requeued)
    finally:
        await engine.dispose()


def test_a_killed_worker_leaves_no_reservation_behind(
    stack: Stack, client: httpx.Client, tenant: str, standing: Standing
) -> None:
    with in_a_call(stack, client, tenant) as run:
        stack.worker.kill()
        assert standing()[1] > 0
        stack.until(lambda: asyncio.run(_rescue(stack.database_url)))
        assert standing() == (NOTHING, NOTHING)
        assert client.get(f"/v1/runs/{run['id']}").json()["status"] == "queued"
        stack.worker.start()
        assert rest(client, run)["status"] == "succeeded"
    assert standing() == (COST, NOTHING)


def test_a_worker_frozen_beyond_its_lease_leaves_none_either_and_reserves_nothing_when_it_wakes(
    stack: Stack, client: httpx.Client, tenant: str, standing: Standing
) -> None:
    with more_workers(stack, 1) as [other]:
        stack.worker.stop()
        with in_a_call(stack, client, tenant, seconds=6) as run:
            other.pause()
            stack.worker.start()
            assert rest(client, run)["status"] == "succeeded"
            assert standing() == (COST, NOTHING)
            other.resume()
            time.sleep(3)
            assert standing() == (COST, NOTHING) == (recorded(stack.database_url, tenant), NOTHING)


def test_a_worker_that_drains_in_the_middle_of_a_call_leaves_none_behind(
    stack: Stack, client: httpx.Client, tenant: str, standing: Standing
) -> None:
    with in_a_call(stack, client, tenant) as run:
        stack.worker.stop()
        assert client.get(f"/v1/runs/{run['id']}").json()["status"] == "queued"
        assert standing() == (NOTHING, NOTHING)
        stack.worker.start()
        assert rest(client, run)["status"] == "succeeded"
    assert standing() == (COST, NOTHING)


def test_a_cancelled_call_leaves_none_behind_and_counts_as_what_it_may_have_cost(
    stack: Stack, client: httpx.Client, tenant: str, standing: Standing
) -> None:
    with in_a_call(stack, client, tenant) as run:
        reserved = standing()[1]
        client.post(f"/v1/runs/{run['id']}/cancel")
        assert standing() == (reserved, NOTHING)
        time.sleep(0.5)
        assert standing() == (reserved, NOTHING)
        assert client.get(f"/v1/runs/{run['id']}").json()["usage"]["cost_usd"] == 0


def test_a_model_that_refuses_costs_nothing(
    stack: Stack, client: httpx.Client, tenant: str, standing: Standing
) -> None:
    give_budget(stack.database_url, tenant, "1")
    assert rest(client, play(stack, client, [{"fault": "status:400"}]))["stop_reason"] == "model_error"
    assert standing() == (NOTHING, NOTHING)


def test_one_reservation_is_for_all_the_tries_of_a_call(
    stack: Stack, client: httpx.Client, tenant: str, standing: Standing
) -> None:
    give_budget(stack.database_url, tenant, str(MOST))
    replies: list[Reply] = [{"fault": "status:500"}, {"fault": "truncated"}, say("done", usage=USAGE)]
    assert rest(client, play(stack, client, replies))["status"] == "succeeded"
    assert standing() == (COST, NOTHING)


def test_a_run_that_waits_for_a_person_has_nothing_reserved(
    stack: Stack, client: httpx.Client, tenant: str, standing: Standing
) -> None:
    give_budget(stack.database_url, tenant, "1")
    asked = calls(("open_the_door", None), ("echo", {"text": "x"}), usage=USAGE)
    run = play(stack, client, [asked], "toolbox")
    assert rest(client, run)["status"] == "waiting"
    assert standing() == (COST, NOTHING)
    client.post(f"/v1/runs/{run['id']}/cancel")
    assert standing() == (COST, NOTHING)
