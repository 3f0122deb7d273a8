"""What a turn of the loop costs Postgres: transactions, counted by Postgres itself."""

import time

import httpx
import psycopg

from tests.scripts import DONE, Reply, Script, call, submit
from tests.stack import Stack

RUNS = 60
TURNS = 8
WINDOW_SECONDS = 18.0
"""Postgres' processes report what they have counted when they have been idle for ten seconds."""


def transactions(stack: Stack) -> int:
    with psycopg.connect(stack.database_url, autocommit=True) as connection:
        row = connection.execute(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone()
    assert row is not None
    return int(row[0])


def transactions_of(stack: Stack, client: httpx.Client, replies: list[Reply]) -> int:
    """All that are made in a window of fixed length, in which so many runs play this script.

    Nobody looks at the runs meanwhile: that would be transactions, too.
    """
    scripts = [Script(stack.model_url, replies) for _ in range(RUNS)]
    before, began = transactions(stack), time.monotonic()
    for script in scripts:
        submit(client, "toolbox", script.input)
    time.sleep(began + WINDOW_SECONDS - time.monotonic())
    return transactions(stack) - before


def test_a_turn_takes_two_commits_and_one_more_before_an_unsafe_call(stack: Stack, client: httpx.Client) -> None:
    short = transactions_of(stack, client, [call("echo", {"text": "0"}), DONE])
    safe = transactions_of(stack, client, [*(call("echo", {"text": str(turn)}) for turn in range(TURNS)), DONE])
    unsafe = transactions_of(stack, client, [*(call("charge", {"amount": turn}) for turn in range(TURNS)), DONE])
    succeeded = client.get("/v1/runs", params={"limit": 100, "status": "succeeded"}).json()
    assert len(succeeded["data"]) == 100
    others = [client.get("/v1/runs", params={"status": status}).json()["data"] for status in ("running", "failed")]
    assert others == [[], []]
    a_turn = (safe - short) / (RUNS * (TURNS - 1))
    an_intent = (unsafe - safe) / (RUNS * TURNS)
    print(f"commits: {a_turn:.2f} a turn, {an_intent:.2f} more before an unsafe call")
    # What heartbeats and sweeps make in a window differs by a few.
    assert 1.5 < a_turn < 2.2
    assert 0.5 < an_intent < 1.2
