"""What a tenant may spend on models in a day, in UTC.

One row a tenant that has a budget. A worker reserves what a call may cost at most before it makes it; a trigger on
`runs` (`settle_budget`) turns the reservation into what was spent, or releases it, in the very transaction that records
the reply or lets go of the run.
"""

from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.fetch import fetch_one

TODAY = "(now() AT TIME ZONE 'UTC')::date"
SPENT_TODAY = f"CASE WHEN budgets.day = {TODAY} THEN budgets.spent_usd ELSE 0 END"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """US dollars. `spent`: today. `reserved`: for calls under way. `renewed_in`: seconds until midnight, UTC."""

    tenant: str
    daily: Decimal
    spent: Decimal
    reserved: Decimal
    renewed_in: float


_COLUMNS = f"""
    tenant, daily_usd AS daily, {SPENT_TODAY} AS spent, reserved_usd AS reserved,
    CAST(extract(epoch FROM ({TODAY} + 1)::timestamp - now() AT TIME ZONE 'UTC') AS double precision) AS renewed_in
"""

_GET = text(f"SELECT {_COLUMNS} FROM budgets WHERE tenant = :tenant")  # noqa: S608 - the columns are a constant


async def get(connection: AsyncConnection, tenant: str) -> Budget | None:
    """The tenant's budget as it stands; None: it has none."""
    row = await fetch_one(connection, _GET, {"tenant": tenant})
    return Budget(**row) if row else None
