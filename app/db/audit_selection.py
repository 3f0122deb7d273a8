"""Whose audit is exported, and the event that says so in each run."""
# ruff: noqa: S608 - statements are put together from constants of this module

from dataclasses import asdict, dataclass
from datetime import datetime
from uuid import UUID

import psycopg

from app.db.audit import audit_parameters
from app.domain.audit import AuditEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which runs; None means all. `since` and `until` are about when they were accepted."""

    run_ids: list[UUID] | None = None
    tenant: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_everything(self) -> bool:
        return self == EVERYTHING


EVERYTHING = Selection()
SELECTED = """
    (SELECT id FROM runs
     WHERE (%(run_ids)s::uuid[] IS NULL OR id = ANY(%(run_ids)s)) AND (%(tenant)s::text IS NULL OR tenant = %(tenant)s)
       AND (%(since)s::timestamptz IS NULL OR created_at >= %(since)s)
       AND (%(until)s::timestamptz IS NULL OR created_at < %(until)s))
"""


_NOTE_READS = f"""
    SELECT id, append_audit(id, tenant, %(actor)s, %(events)s::jsonb)
    FROM (SELECT id, tenant FROM runs
          WHERE id IN {SELECTED} AND (%(after)s::uuid IS NULL OR id > %(after)s) ORDER BY id LIMIT 500) AS run
"""


def note_reads(connection: psycopg.Connection, selection: Selection, entry: AuditEntry, *, actor: str) -> None:
    """Append an event to every run that is selected, some hundred in a transaction."""
    parameters = {**asdict(selection), **audit_parameters(actor, entry), "after": None}
    while noted := connection.execute(_NOTE_READS.encode(), parameters).fetchall():
        parameters["after"] = noted[-1][0]


_KNOWN = "SELECT id FROM runs WHERE id = ANY(%s)"


def unknown_runs(connection: psycopg.Connection, run_ids: list[UUID]) -> list[UUID]:
    """Those of which there is none."""
    known = {row[0] for row in connection.execute(_KNOWN, [run_ids])}
    return [run_id for run_id in run_ids if run_id not in known]
