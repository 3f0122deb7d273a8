"""Decisions that meet: another decision, an expiry, a cancel, a Redis that is away. One outcome, told to everybody.

Real servers and a real worker; whoever decides does so over HTTP, with a key of their own.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from random import Random
from typing import Any

import httpx
import psycopg
import pytest

from app.db import expiry
from app.db.engine import make_engine, transactional
from app.devstack.access import make_key
from app.domain.principal import Scope
from tests.api.conftest import client_of
from tests.scripts import DONE, Run, Script, call, calls, events_of, rest, submit
from tests.stack import Stack
from tests.waiting import put_to_wait, request, rules
from tests.worker.test_outages import Outage, dead, frozen

Json = dict[str, Any]
ROUNDS = 30
Act = Callable[[], httpx.Response]
ENDS = {"run.succeeded": "succeeded", "run.failed": "failed", "run.cancelled": "cancelled"}


@pytest.fixture
def reviewer(stack: Stack, tenant: str) -> Iterator[httpx.Client]:
    """Somebody who may decide, and nothing else."""
    key = make_key(stack.database_url, tenant=tenant, name="reviewer", scopes=[Scope.REVIEWS_DECIDE])
    with client_of(stack.api, key) as client:
        yield client


def at_once(*acts: Act) -> list[httpx.Response]:
    """Their answers, in the order of the acts."""
    barrier = threading.Barrier(len(acts))

    def one(act: Act) -> httpx.Response:
        barrier.wait()
        return act()

    with ThreadPoolExecutor(len(acts)) as threads:
        return list(threads.map(one, acts))


def reviews_of(client: httpx.Client, run_id: str) -> list[Json]:
    found = client.get("/v1/reviews", params={"limit": 100}).json()["data"]
    return [review for review in found if review["run_id"] == run_id]


def decision(client: httpx.Client, review: Json, what: str = "approve", **more: Any) -> Act:
    body = {"decision": what, "args_hash": review["args_hash"], **more}
    return lambda: client.post(f"/v1/reviews/{review['id']}/decision", json=body)


def audit(client: httpx.Client, run_id: str) -> list[Json]:
    """Its events, but for those of our own looking."""
    return [event for event in events_of(client, run_id) if event["kind"] != "run.read"]


def one_story(client: httpx.Client, run_id: str) -> tuple[Run, Counter[str]]:
    """The run at its end, and how often what happened: its row, its reviews and its audit have to agree."""
    run = rest(client, {"id": run_id})
    kinds = [event["kind"] for event in audit(client, run_id)]
    assert [ENDS[kind] for kind in kinds if kind in ENDS] == [run["status"]], kinds
    assert kinds[-1] in ENDS
    statuses = Counter(review["status"] for review in reviews_of(client, run_id))
    counted = Counter(kinds)
    assert statuses["pending"] == 0
    assert (statuses["decided"], statuses["expired"]) == (counted["review.decided"], counted["review.expired"])
    assert counted["run.claimed"] == run["attempt"]
    return run, counted


def problem(answer: httpx.Response) -> str | None:
    return None if answer.status_code == 200 else str(answer.json()["type"].rpartition(":")[2])


def test_of_ten_reviewers_one_decides_and_nine_are_told_so(stack: Stack, client: httpx.Client, tenant: str) -> None:
    people = [
        client_of(stack.api, make_key(stack.database_url, tenant=tenant, name=f"reviewer {number}"))
        for number in range(10)
    ]
    script = Script(stack.model_url, [call("open_the_door"), DONE])
    run = rest(client, submit(client, "toolbox", script.input))
    (review,) = reviews_of(client, run["id"])
    answers = at_once(
        *(decision(person, review, "approve" if number % 2 else "reject") for number, person in enumerate(people))
    )
    (won,) = (answer for answer in answers if answer.status_code == 200)
    assert sorted(map(str, map(problem, answers))) == ["None", *["review-decided"] * 9]
    _, counted = one_story(client, run["id"])
    assert (counted["review.decided"], counted["run.requeued"]) == (1, 1)
    (event,) = (event for event in audit(client, run["id"]) if event["kind"] == "review.decided")
    winner = people[answers.index(won)]
    assert event["actor"] == won.json()["decided_by"] == "key:" + winner.headers["Authorization"].split("_")[1]
    assert event["data"]["decision"] == won.json()["decision"]
    made = [step for step in client.get(f"/v1/runs/{run['id']}/steps").json()["data"] if step["kind"] == "tool"]
    assert [step["state"] for step in made] == ["succeeded" if won.json()["decision"] == "approve" else "rejected"]
    for person in people:
        person.close()


@contextmanager
def expiring(stack: Stack) -> Iterator[None]:
    """Reviews expire the moment they are due, and not only with the next sweep."""
    stopped = threading.Event()

    async def keep_expiring() -> None:
        engine = make_engine(stack.database_url, pool_size=2, application_name="test")
        try:
            while not stopped.is_set():
                async with transactional(engine).begin() as connection:
                    await expiry.expire_due(connection, limit=1_000)
                await asyncio.sleep(0.001)
        finally:
            await engine.dispose()

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(asyncio.run, keep_expiring())
        try:
            yield
        finally:
            stopped.set()
            done.result()


def test_a_decision_and_an_expiry_of_the_same_moment_have_one_outcome(
    stack: Stack, client: httpx.Client, reviewer: httpx.Client, tenant: str
) -> None:
    seconds, random = 4.0, Random(4)
    script = [DONE]
    run_ids = [
        str(
            put_to_wait(
                stack.database_url,
                request(),
                its=rules(expires_s=seconds),
                tenant=tenant,
                run_input=Script(stack.model_url, script).input,
            )
        )
        for _ in range(ROUNDS)
    ]
    found = {review["run_id"]: review for review in client.get("/v1/reviews", params={"limit": 100}).json()["data"]}

    def decide_about_then(run_id: str) -> httpx.Response:
        until = datetime.fromisoformat(found[run_id]["expires_at"]).timestamp() + random.uniform(-0.06, 0.03)
        time.sleep(max(0.0, until - time.time()))
        return decision(reviewer, found[run_id], "reject")()

    with expiring(stack), ThreadPoolExecutor(ROUNDS) as threads:
        answers = list(threads.map(decide_about_then, run_ids))
        ends = [one_story(client, run_id) for run_id in run_ids]
    for answer, (run, counted) in zip(answers, ends, strict=True):
        if problem(answer) is None:
            assert (counted["review.decided"], counted["run.requeued"]) == (1, 1)
            assert run["stop_reason"] == "final_answer"
        else:
            assert problem(answer) == "review-expired"
            assert (counted["review.decided"], counted["run.requeued"]) == (0, 0)
            assert run["stop_reason"] == "review_expired"
    assert {problem(answer) for answer in answers} == {None, "review-expired"}, "no round came near the moment"


def test_of_two_reviews_one_decided_as_the_other_expires_the_run_ends_truthfully(
    stack: Stack, client: httpx.Client, reviewer: httpx.Client, tenant: str
) -> None:
    """Both are due at the same moment; whichever way it goes, nothing that was decided counts as expired."""
    run_ids = [
        str(put_to_wait(stack.database_url, request(seq=1), request(seq=2), its=rules(expires_s=2), tenant=tenant))
        for _ in range(ROUNDS // 2)
    ]
    found = client.get("/v1/reviews", params={"limit": 100}).json()["data"]
    random = Random(4)

    def decide_about_then(review: Json) -> httpx.Response:
        until = datetime.fromisoformat(review["expires_at"]).timestamp() + random.uniform(-0.05, 0.01)
        time.sleep(max(0.0, until - time.time()))
        return decision(reviewer, review, "reject")()

    with expiring(stack), ThreadPoolExecutor(len(found)) as threads:
        answers = dict(zip([review["id"] for review in found], threads.map(decide_about_then, found), strict=True))
        for run_id in run_ids:
            _, counted = one_story(client, run_id)
            its = [problem(answers[review["id"]]) for review in found if review["run_id"] == run_id]
            assert counted["review.decided"] == its.count(None)
            assert counted["run.requeued"] == (its.count(None) == 2)
            assert set(its) <= {None, "review-expired", "conflict"}


def test_a_decision_and_a_cancel_of_the_same_moment_have_one_outcome(
    stack: Stack, client: httpx.Client, reviewer: httpx.Client, tenant: str
) -> None:
    seen = set()
    for number in range(ROUNDS):
        run_id = str(put_to_wait(stack.database_url, tenant=tenant))
        (review,) = reviews_of(client, run_id)
        acts: list[Act] = [decision(reviewer, review), partial(client.post, f"/v1/runs/{run_id}/cancel")]
        decided, cancelled = at_once(*acts) if number % 2 else reversed(at_once(*reversed(acts)))
        run, counted = one_story(client, run_id)
        seen.add(problem(decided))
        assert counted["review.decided"] == (problem(decided) is None)
        assert problem(decided) in (None, "conflict")
        if cancelled.status_code == 202:
            assert run["status"] == "cancelled"
        else:  # it had gone on and ended before
            assert (cancelled.status_code, problem(decided)) == (409, None)
            assert run["status"] != "cancelled"
    assert seen == {None, "conflict"}, "one of the two was always first"


def test_two_people_who_decide_the_two_reviews_of_a_run_at_once_send_it_on_once(
    stack: Stack, client: httpx.Client, reviewer: httpx.Client
) -> None:
    wanted = calls(("open_the_door", {}), ("pay", {"amount": 60}))
    scripts = [Script(stack.model_url, [wanted, DONE]) for _ in range(ROUNDS // 2)]
    waiting = [rest(client, run) for run in [submit(client, "toolbox", script.input) for script in scripts]]
    for run in waiting:
        first, second = reviews_of(client, run["id"])
        assert [answer.status_code for answer in at_once(decision(reviewer, first), decision(client, second))] == [
            200,
            200,
        ]
    for run in waiting:
        ended, counted = one_story(client, run["id"])
        assert (ended["status"], counted["review.decided"], counted["run.requeued"]) == ("succeeded", 2, 1)


@pytest.mark.parametrize("outage", [dead, frozen])
def test_whoever_decides_does_not_wait_for_redis_and_the_run_goes_on_when_it_is_back(
    stack: Stack, client: httpx.Client, reviewer: httpx.Client, outage: Outage
) -> None:
    runs = [
        rest(client, submit(client, "toolbox", Script(stack.model_url, [call("open_the_door"), DONE]).input))
        for _ in range(6)
    ]
    found = [reviews_of(client, run["id"])[0] for run in runs]
    with outage(stack):
        for number, review in enumerate(found):
            began = time.monotonic()
            # Whoever waits for the end of the first one would be told of it over Redis.
            answer = (decision(reviewer, review) if number else decision(reviewer, review, "reject", end_run=True))()
            assert answer.status_code == 200, answer.text
            assert time.monotonic() - began < 0.5
        states = [client.get(f"/v1/runs/{run['id']}").json()["status"] for run in runs]
        assert states == ["failed", *["queued"] * 5]
        with psycopg.connect(stack.owner_url) as connection:
            marked = connection.execute("SELECT id FROM runs WHERE needs_enqueue").fetchall()
        assert {str(run_id) for (run_id,) in marked} >= {run["id"] for run in runs[1:]}
    began = time.monotonic()
    for run in runs[1:]:
        ended, counted = one_story(client, run["id"])
        assert (ended["status"], counted["run.requeued"]) == ("succeeded", 1)
    assert time.monotonic() - began < 10


def test_a_run_goes_on_within_two_seconds_of_the_decision(
    stack: Stack, client: httpx.Client, reviewer: httpx.Client
) -> None:
    scripts = [Script(stack.model_url, [call("open_the_door"), DONE]) for _ in range(10)]
    waiting = [rest(client, run) for run in [submit(client, "toolbox", script.input) for script in scripts]]
    took = []
    for run in waiting:
        assert decision(reviewer, reviews_of(client, run["id"])[0])().status_code == 200
        rest(client, run)
        at = {event["kind"]: datetime.fromisoformat(event["at"]) for event in audit(client, run["id"])}
        took.append((at["run.claimed"] - at["review.decided"]).total_seconds())
    assert max(took) < 2
    assert sorted(took)[5] < 0.5, "it is Redis that tells a worker, and the sweeper only where that fails"
