"""What a turn of the loop costs Postgres: transactions that write, counted by the ids that Postgres gives out."""

import httpx

from tests.scripts import DONE, Reply, Script, call, submit
from tests.spending import give_budget, rows, stand
from tests.stack import Stack

RUNS = 60
TURNS = 8


def transactions(stack: Stack) -> int:
    """Only what writes has an id: a question whose answer is that there is nothing to write costs no commit."""
    [row] = rows(stack.database_url, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text AS next")
    return int(row["next"])


def transactions_of(stack: Stack, client: httpx.Client, tenant: str, replies: list[Reply]) -> int:
    """All that are made while so many runs play this script."""
    scripts = [Script(stack.model_url, replies) for _ in range(RUNS)]
    before = transactions(stack)
    for script in scripts:
        submit(client, "toolbox", script.input)
    is_open = "SELECT id FROM runs WHERE tenant = %s AND ended_at IS NULL LIMIT 1"
    stack.until(lambda: not rows(stack.database_url, is_open, tenant), seconds=60)
    after = transactions(stack)
    ends = rows(stack.database_url, "SELECT DISTINCT stop_reason AS end FROM runs WHERE tenant = %s", tenant)
    assert [row["end"] for row in ends] == ["final_answer"]
    return after - before


SHORT = [call("echo", {"text": "0"}), DONE]
SAFE = [*(call("echo", {"text": str(turn)}) for turn in range(TURNS)), DONE]
UNSAFE = [*(call("charge", {"amount": turn}) for turn in range(TURNS)), DONE]


def test_a_turn_takes_two_commits_and_one_more_before_an_unsafe_call(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    short, safe, unsafe = (transactions_of(stack, client, tenant, replies) for replies in (SHORT, SAFE, UNSAFE))
    a_turn = (safe - short) / (RUNS * (TURNS - 1))
    an_intent = (unsafe - safe) / (RUNS * TURNS)
    print(f"commits: {a_turn:.2f} a turn, {an_intent:.2f} more before an unsafe call")
    # Heartbeats and sweeps make a few meanwhile.
    assert 1.8 < a_turn < 2.2
    assert 0.8 < an_intent < 1.2


def test_a_turn_of_a_tenant_with_a_budget_takes_one_more_that_waits_for_no_disk(
    stack: Stack, client: httpx.Client, tenant: str
) -> None:
    give_budget(stack.database_url, tenant, "999")
    short, safe = (transactions_of(stack, client, tenant, replies) for replies in (SHORT, SAFE))
    a_turn = (safe - short) / (RUNS * (TURNS - 1))
    print(f"commits: {a_turn:.2f} a turn with a budget")
    assert 2.8 < a_turn < 3.2
    spent, reserved = stand(stack.database_url, tenant)
    assert spent > 0
    assert reserved == 0
