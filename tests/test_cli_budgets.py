"""`agent-service budgets`: what tenants may spend, from the terminal."""

import re
from collections.abc import Callable

import psycopg
import pytest
from click.testing import CliRunner, Result

import app.cli
from app.devstack.access import make_key
from tests.spending import give_budget, rows
from tests.waiting import put_to_wait

Budgets = Callable[..., Result]


@pytest.fixture
def budgets(database_url: str) -> Budgets:
    """Runs `agent-service budgets` in this process, on a migrated database of this test's own."""
    runner = CliRunner(env={"DATABASE_URL": database_url})
    return lambda *arguments: runner.invoke(app.cli.cli, ["budgets", *arguments], prog_name="agent-service")


def table(result: Result) -> list[list[str]]:
    assert result.exit_code == 0, result.stderr
    return [re.split(r"  +", line) for line in result.stdout.splitlines()]


def put_step(owner_url: str, database_url: str, tenant: str, usd: str) -> None:
    """A run of the tenant's that has asked a model, today."""
    run_id = put_to_wait(database_url, tenant=tenant)
    with psycopg.connect(owner_url) as connection:
        connection.execute(
            "INSERT INTO steps (run_id, seq, kind, attempt, body) VALUES (%s, 0, 'model', 1, %s)",
            [run_id, f'{{"cost_usd": "{usd}"}}'],
        )


def test_a_new_budget_says_what_is_spent_of_it_already(budgets: Budgets, database_url: str, owner_url: str) -> None:
    make_key(database_url, tenant="acme", name="test")
    put_step(owner_url, database_url, "acme", "1.25")
    put_step(owner_url, database_url, "acme", "0.0045")
    put_step(owner_url, database_url, "other", "8")
    result = budgets("set", "acme", "25")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "Tenant acme may spend 25.00 US dollars a day; 1.2545 of today's are spent.\n"


def test_the_list_shows_what_is_left_of_each(budgets: Budgets, database_url: str) -> None:
    titles = ["TENANT", "DAILY", "SPENT TODAY", "RESERVED", "LEFT", "RENEWED IN"]
    assert table(budgets("list")) == [titles]
    give_budget(database_url, "zoo", "0.5", spent="0.75")
    give_budget(database_url, "acme", "10", spent="1.5", reserved="0.00819225")
    [shown, acme, zoo] = table(budgets("list"))
    assert shown == titles
    assert acme[:5] == ["acme", "10.00", "1.50", "0.00819225", "8.49180775"]
    assert zoo[:5] == ["zoo", "0.50", "0.75", "0.00", "0.00"]
    assert re.fullmatch(r"\d+ (h|min|s)", acme[5])


def test_yesterdays_spending_is_not_shown(budgets: Budgets, database_url: str) -> None:
    give_budget(database_url, "acme", "10", spent="1.5")
    rows(database_url, "UPDATE budgets SET day = day - 1 RETURNING day")
    assert table(budgets("list"))[1][:5] == ["acme", "10.00", "0.00", "0.00", "10.00"]


def test_a_changed_budget_keeps_what_is_spent_and_reserved(budgets: Budgets, database_url: str) -> None:
    give_budget(database_url, "acme", "10", spent="1.5", reserved="0.25")
    assert "1.50 of today's are spent" in budgets("set", "acme", "0").stderr
    assert table(budgets("list"))[1][:5] == ["acme", "0.00", "1.50", "0.25", "0.00"]


def test_a_removed_budget_limits_nothing_any_more(budgets: Budgets, database_url: str) -> None:
    give_budget(database_url, "acme", "10")
    give_budget(database_url, "zoo", "10")
    result = budgets("remove", "acme")
    assert (result.exit_code, result.stderr) == (0, "Tenant acme has no budget any more.\n")
    assert [row[0] for row in table(budgets("list"))] == ["TENANT", "zoo"]
    again = budgets("remove", "acme")
    assert (again.exit_code, again.stderr) == (1, "agent-service: tenant 'acme' has no budget\n")


def test_a_tenant_that_nobody_knows_may_be_a_slip_of_the_pen(budgets: Budgets, database_url: str) -> None:
    make_key(database_url, tenant="acme", name="test")
    hint = "There is no key of a tenant 'amce' yet: is that its name?"
    result = budgets("set", "amce", "1")
    assert result.exit_code == 0
    assert hint in result.stderr
    assert "no key" not in budgets("set", "acme", "1").stderr


@pytest.mark.parametrize(
    "usd", ["", "x", "-1", "1e3", "NaN", "inf", "1,50", "1_000", "1000000", "0.123456789", "$5", " 5", "5.", ".5", "٣"]
)
def test_what_is_no_amount_is_said_so_and_changes_nothing(budgets: Budgets, usd: str) -> None:
    result = budgets("set", "--", "acme", usd)
    assert result.exit_code == 2
    assert f"{usd!r} is not an amount like 25 or 0.50, from 0 to 999999." in result.stderr
    assert len(table(budgets("list"))) == 1


@pytest.mark.parametrize("tenant", ["", "  ", "a\nb", "a\x1b[2J"])
def test_what_is_no_tenant_is_said_so(budgets: Budgets, tenant: str) -> None:
    result = budgets("set", tenant, "1")
    assert result.exit_code == 2
    assert "must be a word or more of printable text" in result.stderr


@pytest.mark.parametrize("usd", ["0", "999999", "999999.99999999", "0.00000001"])
def test_the_smallest_and_the_largest_amounts_are_kept_exactly(budgets: Budgets, usd: str) -> None:
    assert budgets("set", "acme", usd).exit_code == 0
    daily = table(budgets("list"))[1][1]
    assert daily == (f"{usd}.00" if "." not in usd else usd)


def test_a_table_that_somebody_holds_is_one_line_and_not_waited_for_long(
    budgets: Budgets, database_url: str, owner_url: str
) -> None:
    with psycopg.connect(owner_url) as holder:
        holder.execute("LOCK TABLE budgets IN ROW EXCLUSIVE MODE")
        result = budgets("set", "acme", "1")
    assert result.exit_code == 1
    assert re.fullmatch(r"agent-service: the database: canceling statement due to lock timeout\n", result.stderr)
