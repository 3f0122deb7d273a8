"""What a tenant may spend on models in a day, in UTC.

One row a tenant that has a budget. A worker reserves what a call may cost at most before it makes it; a trigger on
`runs` (`settle_budget`) turns the reservation into what was spent, or releases it, in the very transaction that records
the reply or lets go of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.fetch import Row, fetch, fetch_one
from app.domain.errors import LeaseLost
from app.domain.run import Claim

TODAY = "(now() AT TIME ZONE 'UTC')::date"
# A transaction that began before midnight may come to a budget that another one has renewed already.
SPENT_TODAY = f"CASE WHEN budgets.day >= {TODAY} THEN budgets.spent_usd ELSE 0 END"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """US dollars. `spent`: today. `reserved`: for calls under way. `renewed_in`: seconds until midnight, UTC."""

    tenant: str
    daily: Decimal
    spent: Decimal
    reserved: Decimal
    renewed_in: float

    @property
    def left(self) -> Decimal:
        """What nobody has spent or reserved."""
        return max(self.daily - self.spent - self.reserved, Decimal(0))


_COLUMNS = f"""
    tenant, daily_usd AS daily, {SPENT_TODAY} AS spent, reserved_usd AS reserved,
    CAST(extract(epoch FROM ({TODAY} + 1)::timestamp - now() AT TIME ZONE 'UTC') AS double precision) AS renewed_in
"""

_GET = text(f"SELECT {_COLUMNS} FROM budgets WHERE tenant = :tenant")  # noqa: S608 - the fragments are constants


async def get(connection: AsyncConnection, tenant: str) -> Budget | None:
    """The tenant's budget as it stands; None: it has none."""
    row = await fetch_one(connection, _GET, {"tenant": tenant})
    return Budget(**row) if row else None


_LIST = text(f"SELECT {_COLUMNS} FROM budgets ORDER BY tenant")  # noqa: S608


async def list_all(connection: AsyncConnection) -> Sequence[Budget]:
    return [Budget(**row) for row in await fetch(connection, _LIST, {})]


class Reservation(StrEnum):
    """What came of asking for one."""

    MADE = "made"
    UNLIMITED = "unlimited"
    """The tenant has no budget; nothing was written."""
    BUSY = "busy"
    """It does not fit beside what others have reserved, but may once they have spent less than that."""
    SPENT = "spent"
    """It does not fit into what is left of the day's budget, whatever the others spend."""


# The rows are locked in the order in which everybody does: the run's, then its tenant's budget. Whoever waited for the
# budget is judged again by what it holds then: READ COMMITTED looks at the condition of the UPDATE once more.
#
# A reservation need not survive a crash of Postgres, so nobody waits for the disk; the setting ends with the statement.
# The worst that a crash can do is to forget those of its last moments: calls under way that nobody else takes into
# account until their replies are recorded.
_RESERVE = text(f"""
    WITH held AS MATERIALIZED (
        SELECT runs.id, runs.tenant, runs.reserved_usd, set_config('synchronous_commit', 'off', true)
        FROM runs JOIN budgets USING (tenant)
        WHERE id = :id AND status = 'running' AND lease_token = :token
        FOR NO KEY UPDATE OF runs
    ), fitting AS (
        UPDATE budgets
        SET reserved_usd = budgets.reserved_usd - held.reserved_usd + CAST(:usd AS numeric(14, 8)),
            spent_usd = {SPENT_TODAY}, day = greatest(budgets.day, {TODAY})
        FROM held
        WHERE budgets.tenant = held.tenant
          AND {SPENT_TODAY} + budgets.reserved_usd - held.reserved_usd + CAST(:usd AS numeric(14, 8)) <= daily_usd
        RETURNING budgets.tenant
    ), made AS (
        UPDATE runs SET reserved_usd = CAST(:usd AS numeric(14, 8))
        FROM held JOIN fitting USING (tenant) WHERE runs.id = held.id
        RETURNING runs.id
    )
    SELECT CASE
        WHEN budgets.tenant IS NULL THEN 'unlimited'
        WHEN EXISTS (SELECT FROM made) THEN 'made'
        WHEN {SPENT_TODAY} + CAST(:usd AS numeric(14, 8)) <= daily_usd THEN 'busy'
        ELSE 'spent'
    END AS outcome
    FROM runs LEFT JOIN budgets USING (tenant) WHERE id = :id AND status = 'running' AND lease_token = :token
""")  # noqa: S608


async def reserve(connection: AsyncConnection, claim: Claim, usd: Decimal | None) -> Reservation:
    """Reserve for the run's next model call what it may cost at most, in place of what the run has reserved before.

    None: nobody knows what it may cost, so it fits into no budget. Raises `LeaseLost`.
    """
    parameters = {"id": claim.run.id, "token": claim.token, "usd": usd}
    row = await fetch_one(connection, _RESERVE, parameters)
    if row is None:
        raise LeaseLost(f"run {claim.run.id} is not held any more")
    return Reservation(row["outcome"])


_CHANGE = text(f"UPDATE budgets SET daily_usd = :usd WHERE tenant = :tenant RETURNING {_COLUMNS}")  # noqa: S608

# Whatever records a reply settles with this table, also for a tenant that has no row in it. So behind this lock, what
# is in `runs` and `steps` is all that was recorded, and what is recorded later finds the new row.
_BE_PATIENT = text("""
    SELECT set_config('lock_timeout', CAST(:patience_ms AS text), true),
           set_config('idle_in_transaction_session_timeout', CAST(:patience_ms AS text), true)
""")
_HOLD_ALL = text("LOCK TABLE budgets IN SHARE ROW EXCLUSIVE MODE")
PATIENCE_SECONDS = 5.0

_ADD = text(f"""
    WITH today AS (
        SELECT {TODAY} AS day, {TODAY}::timestamp AT TIME ZONE 'UTC' AS began
    )
    INSERT INTO budgets (tenant, daily_usd, day, spent_usd, reserved_usd)
    SELECT :tenant, :usd, today.day, (
        SELECT coalesce(sum(round(CAST(steps.body ->> 'cost_usd' AS numeric), 8)), 0)
        FROM runs JOIN steps ON steps.run_id = runs.id
        WHERE runs.tenant = :tenant AND (runs.ended_at IS NULL OR runs.ended_at >= today.began)
          AND steps.kind = 'model' AND steps.recorded_at >= today.began
    ), (
        SELECT coalesce(sum(reserved_usd), 0) FROM runs WHERE tenant = :tenant AND status = 'running'
    )
    FROM today
    ON CONFLICT (tenant) DO UPDATE SET daily_usd = excluded.daily_usd
    RETURNING {_COLUMNS}
""")  # noqa: S608


async def set_daily(connection: AsyncConnection, tenant: str, usd: Decimal) -> Budget:
    """Give the tenant a budget, or change the one that it has. In a transaction of its own.

    A new one counts what the tenant's runs have spent today already; it lets nothing be recorded while it looks for
    that. Of a changed one, what is spent and reserved stays. Calls under way for a tenant that had no budget are not
    reserved: they count when their replies are recorded.
    """
    change = {"tenant": tenant, "usd": usd}
    row: Row | None = await fetch_one(connection, _CHANGE, change)
    if row is None:
        await fetch(connection, _BE_PATIENT, {"patience_ms": int(PATIENCE_SECONDS * 1000)})
        await connection.execute(_HOLD_ALL)
        row = await fetch_one(connection, _ADD, change)
        assert row is not None
    return Budget(**row)


_REMOVE = text("DELETE FROM budgets WHERE tenant = :tenant RETURNING tenant")


async def remove(connection: AsyncConnection, tenant: str) -> bool:
    """From now on the tenant may spend what it wants. False: it had no budget."""
    return bool(await fetch(connection, _REMOVE, {"tenant": tenant}))


_HAS_KEYS = text("SELECT EXISTS (SELECT FROM api_keys WHERE tenant = :tenant) AS has_keys")


async def has_keys(connection: AsyncConnection, tenant: str) -> bool:
    """Is there such a tenant? One is known by its keys."""
    row = await fetch_one(connection, _HAS_KEYS, {"tenant": tenant})
    return row is not None and bool(row["has_keys"])
