"""What tenants may spend on models in a day."""

import re
from datetime import timedelta
from decimal import Decimal

import click

from app.cli.database import in_database, in_transaction
from app.cli.failure import fail
from app.cli.table import print_table
from app.cli.text import printable, span


class Dollars(click.ParamType[Decimal]):
    """An amount that the database can hold."""

    name = "usd"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Decimal:
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,8})?", str(value)):
            self.fail(f"{value!r} is not an amount like 25 or 0.50, from 0 to 999999.", param, ctx)
        return Decimal(str(value))


@click.group()
def budgets() -> None:
    """What tenants may spend on models in a day."""


@budgets.command(name="set")
@click.argument("tenant")
@click.argument("usd", type=Dollars())
def set_budget(tenant: str, usd: Decimal) -> None:
    """Let TENANT spend USD (US dollars) a day, from midnight to midnight UTC; 0 lets it spend nothing.

    What it has spent today counts, also what it spent before it had a budget.
    """
    from app.db import budgets

    if not tenant.strip() or not tenant.isprintable():
        raise click.BadParameter("must be a word or more of printable text", param_hint="TENANT")
    budget = in_transaction(lambda connection: budgets.set_daily(connection, tenant, usd))
    of_today = f"{dollars(budget.spent)} of today's are spent"
    click.echo(f"Tenant {tenant} may spend {dollars(budget.daily)} US dollars a day; {of_today}.", err=True)
    if not in_database(lambda connection: budgets.has_keys(connection, tenant)):
        click.echo(f"There is no key of a tenant {tenant!r} yet: is that its name?", err=True)


@budgets.command(name="list")
def list_budgets() -> None:
    """All budgets, in US dollars. A tenant that is not listed has none: it may spend what it wants."""
    from app.db import budgets

    titles = ("TENANT", "DAILY", "SPENT TODAY", "RESERVED", "LEFT", "RENEWED IN")
    print_table(
        titles,
        [
            (
                printable(budget.tenant),
                dollars(budget.daily),
                dollars(budget.spent),
                dollars(budget.reserved),
                dollars(budget.left),
                span(timedelta(seconds=budget.renewed_in)),
            )
            for budget in in_database(budgets.list_all)
        ],
    )


@budgets.command()
@click.argument("tenant")
def remove(tenant: str) -> None:
    """Let TENANT spend what it wants from now on."""
    from app.db import budgets

    if not in_database(lambda connection: budgets.remove(connection, tenant)):
        fail(f"tenant {tenant!r} has no budget")
    click.echo(f"Tenant {tenant} has no budget any more.", err=True)


def dollars(amount: Decimal) -> str:
    """At least two decimals, and as many more as it has."""
    whole, _, decimals = f"{amount:.8f}".partition(".")
    return f"{whole}.{decimals.rstrip('0'):0<2}"
