"""Writes the audit to a file that can be verified without the database: see `app.audit.exported` for what it holds."""

import base64
import gzip
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import psycopg

from app import __version__
from app.audit.exported import COUNTED, FORMAT
from app.audit.source import History
from app.db.audit_log import AuditLog, StoredSeal, open_audit_log
from app.db.audit_selection import Selection, note_reads
from app.domain.audit import AuditEntry, AuditKind

_TO_STDOUT = Path("-")


def export_audit(
    database_url: str, out: Path, selection: Selection, *, with_payloads: bool, actor: str
) -> dict[str, int]:
    """Write what is selected to a file (`.gz`: compressed; `-`: standard output); returns how much of what.

    Of a run, payloads are written only after it has an event that says so. Raises `psycopg.Error` and `OSError`.
    """
    export_id = str(uuid4())
    with _opened(out) as file:
        if with_payloads:
            entry = AuditEntry(AuditKind.RUN_READ, {"what": "export", "export": export_id})
            with psycopg.connect(database_url, autocommit=True, application_name="agent-service audit") as connection:
                note_reads(connection, selection, entry, actor=actor)
        with open_audit_log(database_url, selection, with_payloads=with_payloads) as log:
            return AuditWriter(file, export_id if with_payloads else None).write(log, selection)


@contextmanager
def _opened(out: Path) -> Iterator[IO[str]]:
    """For its owner's eyes only: it may hold personal data."""
    if out == _TO_STDOUT:
        yield sys.stdout
        return
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        raw = gzip.GzipFile(fileobj=file, mode="wb") if out.suffix == ".gz" else file
        with TextIOWrapper(raw, encoding="utf-8", newline="\n") as text:
            yield text


class AuditWriter:
    """`export_id`: with payloads, of runs that have an event which names it."""

    def __init__(self, file: IO[str], export_id: str | None) -> None:
        self._file = file
        self._export_id = export_id
        self._counts = dict.fromkeys(COUNTED, 0)

    def write(self, log: AuditLog, selection: Selection) -> dict[str, int]:
        self._line(
            export={
                "format": FORMAT,
                "service": __version__,
                "at": log.at.isoformat(),
                "filter": None if selection.is_everything else _as_json(selection),
                "payloads": self._export_id is not None,
            }
        )
        for seal in log.stored_seals():
            self._write_seal(seal)
        for history in log.histories():
            self._write_history(history)
        self._line(end=self._counts)
        return self._counts

    def _write_seal(self, seal: StoredSeal) -> None:
        self._counts["checkpoints"] += 1
        self._line(
            checkpoint={
                "number": seal.number,
                "body": seal.checkpoint.body if seal.checkpoint else "",
                "signature": base64.b64encode(seal.checkpoint.signature).decode() if seal.checkpoint else "",
                "is_anchored": seal.is_anchored,
            }
        )
        for leaf in seal.leaves:
            self._counts["leaves"] += 1
            if leaf.is_selected:
                self._line(leaf={"run": leaf.run_id, "seq": leaf.seq, "hash": leaf.hash.hex()})
            else:
                self._line(leaf=leaf.hashed.hex())

    def _write_history(self, history: History) -> None:
        self._counts["runs"] += 1
        with_payloads = self._is_noted(history)
        run: dict[str, Any] = {
            "id": history.run_id,
            "tenant": history.row.tenant if history.row else None,
            "status": history.row.status if history.row else None,
            "head": {"seq": history.head[0], "hash": history.head[1]} if history.head else None,
        }
        if self._export_id:
            run["payloads"] = with_payloads
        self._line(run=run)
        for event in history.events:
            self._counts["events"] += 1
            self._file.write(f'{{"hash":"{event.hash}","event":{event.text}}}\n')  # the very bytes that were hashed
            if with_payloads and event.payload is not None:
                self._counts["payloads"] += 1
                self._line(payload=event.payload, salt=event.salt)

    def _is_noted(self, history: History) -> bool:
        """Does it say that its payloads were given away here? A run that was accepted meanwhile does not."""
        return self._export_id is not None and any(
            event.kind == AuditKind.RUN_READ and self._export_id in event.text for event in history.events
        )

    def _line(self, **content: Any) -> None:
        self._file.write(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


def _as_json(selection: Selection) -> dict[str, Any]:
    given = {name: value for name, value in asdict(selection).items() if value is not None}
    return dict(json.loads(json.dumps(given, default=str)))
