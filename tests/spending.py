"""Budgets of tenants, as a test gives them and looks at them from outside."""

from decimal import Decimal
from typing import Any

import psycopg
from psycopg.rows import dict_row

TODAY = "(now() AT TIME ZONE 'UTC')::date"


def rows(database_url: str, statement: str, *parameters: object) -> list[dict[str, Any]]:
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as connection:
        return connection.execute(statement, parameters).fetchall()


def give_budget(database_url: str, tenant: str, daily: str, *, spent: str = "0", reserved: str = "0") -> None:
    """US dollars, in place of the budget that the tenant has."""
    rows(
        database_url,
        f"""
        INSERT INTO budgets (tenant, daily_usd, day, spent_usd, reserved_usd) VALUES (%s, %s, {TODAY}, %s, %s)
        ON CONFLICT (tenant) DO UPDATE SET daily_usd = excluded.daily_usd, day = excluded.day,
            spent_usd = excluded.spent_usd, reserved_usd = excluded.reserved_usd
        RETURNING tenant
        """,
        tenant,
        Decimal(daily),
        Decimal(spent),
        Decimal(reserved),
    )


def stand(database_url: str, tenant: str) -> tuple[Decimal, Decimal]:
    """Spent and reserved."""
    [row] = rows(database_url, "SELECT spent_usd, reserved_usd FROM budgets WHERE tenant = %s", tenant)
    return row["spent_usd"], row["reserved_usd"]


def recorded(database_url: str, tenant: str) -> Decimal:
    """What the model calls in the tenant's steps have cost."""
    [row] = rows(
        database_url,
        """
        SELECT coalesce(sum((body ->> 'cost_usd')::numeric), 0) AS usd
        FROM steps JOIN runs ON runs.id = run_id WHERE tenant = %s AND kind = 'model'
        """,
        tenant,
    )
    usd: Decimal = row["usd"]
    return usd
