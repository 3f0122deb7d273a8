"""Streams the audit out of Postgres, for those who verify or export it: one snapshot, a few thousand rows at a time.

It is read by psycopg itself, without asyncio: a command has nothing else to do, and each row counts. Of what the
database computes here nothing is trusted: it writes values as text, and the verifier hashes them again.
"""
# ruff: noqa: S608 - statements are put together from constants of this module

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from itertools import chain
from math import inf
from typing import Any, NamedTuple
from uuid import UUID

import psycopg

from app.audit.proof import Checkpoint, event_text, leaf_hash
from app.audit.source import History, Recorded, Row, Seal, Sealed
from app.db.audit_selection import EVERYTHING, SELECTED, Selection

FETCHED = 4_000
FETCHED_WITH_PAYLOADS = 400

_BEHIND_ALL = "~"
"""Sorts behind every run's id."""

_Rows = Iterator[tuple[Any, ...]]


_RIGHTS = """
    SELECT current_user, current_setting('is_superuser')::boolean,
           coalesce(array_agg(table_name.name || ' (' || right_of.what || ')' ORDER BY table_name.name, right_of.what)
                    FILTER (WHERE right_of.what IS NOT NULL), '{}')
    FROM unnest(ARRAY['audit_events', 'audit_payloads', 'audit_heads', 'audit_leaves', 'audit_checkpoints'])
             AS table_name (name)
    CROSS JOIN LATERAL (
        SELECT 'its owner' AS what FROM pg_class
        WHERE oid = table_name.name::regclass AND pg_has_role(relowner, 'MEMBER')
        UNION ALL
        SELECT privilege FROM unnest(ARRAY['INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'TRIGGER']) AS privilege
        WHERE has_table_privilege(table_name.name, privilege)
    ) AS right_of
"""


class StoredLeaf(NamedTuple):
    """A leaf as its row has it. `is_selected`: its run is."""

    run_id: str
    seq: int
    hash: bytes
    is_selected: bool

    @property
    def hashed(self) -> bytes:
        """As of `proof.Leaf`, whatever somebody has put into the row."""
        return leaf_hash(UUID(self.run_id).bytes + (self.seq & 0xFFFFFFFF).to_bytes(4, "big") + self.hash)


class StoredSeal(NamedTuple):
    """A checkpoint's row (None: there are only leaves of it) and its leaves."""

    number: int
    checkpoint: Checkpoint | None
    is_anchored: bool
    leaves: Sequence[StoredLeaf]


@contextmanager
def open_audit_log(
    database_url: str,
    selection: Selection = EVERYTHING,
    *,
    since_run: UUID | None = None,
    with_payloads: bool = False,
) -> Iterator["AuditLog"]:
    """The audit as it is now. `since_run`: only this run and those with a higher id. Raises `psycopg.Error`."""
    with psycopg.connect(database_url, application_name="agent-service audit") as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        yield AuditLog(connection, selection, since_run=since_run, with_payloads=with_payloads)


class AuditLog:
    """One snapshot as a source to verify. What is not selected is left out, but for the leaves of its checkpoints."""

    problems: Sequence[str] = ()

    def __init__(
        self, connection: psycopg.Connection, selection: Selection, *, since_run: UUID | None, with_payloads: bool
    ) -> None:
        self._connection = connection
        self._fetched = FETCHED_WITH_PAYLOADS if with_payloads else FETCHED
        self._with_payloads = with_payloads
        self._parameters = {**asdict(selection), "since_run": since_run}
        self._is_selected = "true" if selection.is_everything else f"run_id IN {SELECTED}"
        self.has_all_checkpoints = selection.is_everything
        self._cursors = 0
        row = connection.execute("""
            SELECT now(), set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO', true)
        """).fetchone()
        assert row
        self.at: datetime = row[0]

    @property
    def is_sealed(self) -> bool:
        """Is there any checkpoint?"""
        return self._connection.execute("SELECT FROM audit_checkpoints LIMIT 1").fetchone() is not None

    def rights_to_tamper(self) -> list[str]:
        """What lets the connected user change what was recorded, in sentences."""
        row = self._connection.execute(_RIGHTS).fetchone()
        assert row
        user, is_superuser, tables = row
        if is_superuser:
            return [f"the database user {user} is a superuser, and could change the audit"]
        return [f"the database user {user} could change the audit: {name}" for name in tables]

    def seals(self) -> Iterator[Seal]:
        for number, checkpoint, is_anchored, leaves in self.stored_seals():
            yield Seal(number, checkpoint, is_anchored, [leaf.hashed for leaf in leaves])

    def stored_seals(self) -> Iterator[StoredSeal]:
        """In the order of their numbers, their leaves in the order of runs."""
        is_affected = (
            "true"
            if self.has_all_checkpoints
            else f"number IN (SELECT checkpoint FROM audit_leaves WHERE {self._is_selected})"
        )
        checkpoints = _Groups(
            self._rows(f"""
                SELECT number, body, signature, anchored_at IS NOT NULL FROM audit_checkpoints
                WHERE {is_affected} ORDER BY number
            """),
            end=inf,
        )
        leaves = _Groups(
            self._rows(f"""
                SELECT number, run_id::text, seq, hash, {self._is_selected}
                FROM (SELECT *, checkpoint AS number FROM audit_leaves) AS leaf
                WHERE {is_affected} ORDER BY number, leaf.run_id
            """),
            end=inf,
        )
        while (number := min(checkpoints.key, leaves.key)) != inf:
            rows = [StoredLeaf(*row[1:]) for row in leaves.take(number)]
            stored = checkpoints.take(number)
            if stored:
                [(_, body, signature, is_anchored)] = stored
                yield StoredSeal(number, Checkpoint(body, signature), is_anchored, rows)
            else:
                yield StoredSeal(number, None, False, rows)

    def histories(self) -> Iterator[History]:
        """Everything that names a run; runs without an audit and an audit without a run, too.

        Sorted by the ids themselves, which have indexes (a bare `run_id` would be the text); the order is the same.
        """
        condition = f"{self._is_selected} AND (%(since_run)s::uuid IS NULL OR run_id >= %(since_run)s)"
        runs = _Groups(
            self._rows(f"""
                SELECT id::text, tenant, status FROM (SELECT *, id AS run_id FROM runs) AS run
                WHERE {condition} ORDER BY run.id
            """),
            end=_BEHIND_ALL,
        )
        heads = _Groups(
            self._rows(f"""
                SELECT run_id::text, seq, encode(hash, 'hex') FROM audit_heads
                WHERE {condition} ORDER BY audit_heads.run_id
            """),
            end=_BEHIND_ALL,
        )
        leaves = _Groups(
            self._rows(f"""
                SELECT run_id::text, checkpoint, seq, encode(hash, 'hex') FROM audit_leaves
                WHERE {condition} ORDER BY audit_leaves.run_id, seq
            """),
            end=_BEHIND_ALL,
        )
        payload = "encode(salt, 'hex'), payload" if self._with_payloads else "NULL, NULL"
        events = _Groups(
            self._rows(f"""
                SELECT run_id::text, seq, at::text, tenant, actor, kind, data::text,
                       encode(payload_sha256, 'hex'), encode(hash, 'hex'),
                       audit_payloads.run_id IS NOT NULL, {payload}
                FROM audit_events LEFT JOIN audit_payloads USING (run_id, seq)
                WHERE {condition} ORDER BY audit_events.run_id, seq
            """),
            end=_BEHIND_ALL,
        )
        while (run_id := min(runs.key, heads.key, leaves.key, events.key)) != _BEHIND_ALL:
            run, head = runs.take(run_id), heads.take(run_id)
            yield History(
                run_id,
                Row(*run[0][1:]) if run else None,
                head[0][1:] if head else None,
                [Sealed(*row[1:]) for row in leaves.take(run_id)],
                _recorded(events.take(run_id)),
            )

    def _rows(self, statement: str) -> _Rows:
        return chain.from_iterable(self._batches(statement))

    def _batches(self, statement: str) -> Iterator[list[tuple[Any, ...]]]:
        """By a cursor of the server's, so that several can be read side by side.

        Postgres makes the next batch while this one is worked on.
        """
        self._cursors += 1
        with self._connection.cursor(f"audit_{self._cursors}") as cursor, ThreadPoolExecutor(1) as thread:
            cursor.execute(statement.encode(), self._parameters)
            coming = thread.submit(cursor.fetchmany, self._fetched)
            while rows := coming.result():
                coming = thread.submit(cursor.fetchmany, self._fetched)
                yield rows


class _Groups:
    """Rows in the order of their first column, taken by its values. `end` sorts behind all of them."""

    def __init__(self, rows: _Rows, *, end: Any) -> None:
        self._rows = rows
        self._end = (end,)
        self._next = next(rows, self._end)

    @property
    def key(self) -> Any:
        """The value that comes next."""
        return self._next[0]

    def take(self, key: Any) -> list[tuple[Any, ...]]:
        """The rows that have this value, where it comes next."""
        taken = []
        row, rows, end = self._next, self._rows, self._end
        while row[0] == key:
            taken.append(row)
            row = next(rows, end)
        self._next = row
        return taken


def _recorded(rows: list[tuple[Any, ...]]) -> list[Recorded]:
    """Events of one run, each with the text that it is hashed as, after the hash that is stored before it."""
    events: list[Recorded] = []
    previous: str | None = None
    for run_id, seq, stored_at, tenant, actor, kind, data, payload_sha256, digest, has_payload, salt, payload in rows:
        at = _as_hashed(stored_at)
        text = event_text(
            run_id=run_id,
            seq=seq,
            at=at,
            tenant=tenant,
            actor=actor,
            kind=kind,
            data=data,
            payload_sha256=payload_sha256,
            previous=previous,
        )
        events.append(
            Recorded(seq, at, tenant, kind, payload_sha256, previous, text, digest, has_payload, salt, payload)
        )
        previous = digest
    return events


def _as_hashed(at: str) -> str:
    """2026-01-31 12:00:00.5+00, which is how Postgres writes it, as 2026-01-31T12:00:00.500000Z."""
    if len(at) == 29:  # all six digits, as nearly always
        return f"{at[:10]}T{at[11:26]}Z"
    whole, _, fraction = at[:-3].partition(".")
    return f"{whole[:10]}T{whole[11:]}.{fraction:0<6}Z"
