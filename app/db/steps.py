"""Steps: written by `leases.record`, read here."""

import json
from collections.abc import Sequence
from uuid import UUID

from pydantic import TypeAdapter
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.fetch import Row, fetch
from app.domain.step import Step, ToolStep

_STEP: TypeAdapter[Step] = TypeAdapter(Step)
_OWN_COLUMNS = {"seq", "kind", "attempt", "state", "recorded_at"}


def step_parameters(steps: Sequence[Step]) -> str:
    """Steps as the JSON array that the record statement unpacks."""
    return json.dumps(
        [
            {
                "seq": step.seq,
                "kind": step.kind,
                "attempt": step.attempt,
                "state": step.state if isinstance(step, ToolStep) else None,
                "body": step.model_dump(mode="json", exclude=_OWN_COLUMNS),
            }
            for step in steps
        ]
    )


def _step_of(row: Row) -> Step:
    own = {name: row[name] for name in _OWN_COLUMNS if row[name] is not None}
    return _STEP.validate_python({**row["body"], **own})


_STEPS = text("""
    SELECT seq, kind, attempt, state, body, recorded_at FROM steps
    WHERE run_id = :run_id AND seq > :after ORDER BY seq LIMIT :limit
""")


async def steps_of(
    connection: AsyncConnection, run_id: UUID, *, after: int = -1, limit: int | None = None
) -> Sequence[Step]:
    """Steps of a run in order, those after `after`. Whose run it is, the caller has checked."""
    rows = await fetch(connection, _STEPS, {"run_id": run_id, "after": after, "limit": limit})
    return [_step_of(row) for row in rows]


_NEWEST = text("""
    SELECT seq, kind, attempt, state, body, recorded_at FROM steps
    WHERE run_id = :run_id ORDER BY seq DESC LIMIT :limit
""")


async def newest_of(connection: AsyncConnection, run_id: UUID, *, limit: int) -> Sequence[Step]:
    """The last steps of a run, in order. Whose run it is, the caller has checked."""
    rows = await fetch(connection, _NEWEST, {"run_id": run_id, "limit": limit})
    return [_step_of(row) for row in reversed(rows)]
