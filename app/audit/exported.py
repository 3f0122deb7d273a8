"""Reads an export: JSON lines, also compressed with gzip, in this order. What a line is, its first member says.

{"export": {"format", "service", "at", "filter", "payloads"}}      first
{"checkpoint": {"number", "body", "signature", "is_anchored"}}     in the order of their numbers, each followed by its
{"leaf": {"run", "seq", "hash"}}                                   leaves in their order,
{"leaf": "…"}                                                      or the hash of a leaf of a run that is not exported
{"run": {"id", "tenant", "status", "head": {"seq", "hash"}}}       in the order of their ids, each followed by its
{"hash":"…","event":{…}}                                           events: from brace to brace the text that was hashed,
{"payload": "…", "salt": "…"}                                      and its payload, where payloads are exported
{"end": {"checkpoints", "leaves", "runs", "events", "payloads"}}   last: how many

A run's `tenant` and `status`, or its `head`, are null where its row is missing; with payloads it says whether its own
were exported (`payloads`). Hashes and salts are hex, signatures base64.
"""

import base64
import gzip
import json
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from .proof import Checkpoint, Leaf, leaf_hash
from .source import History, Recorded, Row, Seal, Sealed

FORMAT = 1
COUNTED = ("checkpoints", "leaves", "runs", "events", "payloads")

Line = dict[str, Any]
T = TypeVar("T")


class NotAnExport(ValueError):
    """The file cannot be read as an export at all."""


class Export:
    """An export as a source to verify. Read it once: `seals`, then `histories`.

    Leaves are put in the order of runs on disk (SQLite's, in a file that vanishes), so a large export needs no memory.
    """

    def __init__(self, path: Path) -> None:
        """Raises `NotAnExport` and `OSError`."""
        self.problems: list[str] = []
        self._counts = dict.fromkeys(COUNTED, 0)
        self._number = 0
        self._lines = self._read(path)
        self._next = next(self._lines, "")
        try:
            header = (self._take("export") or {})["export"]
            if header["format"] != FORMAT:
                raise NotAnExport(f"{path} has the format {header['format']}, and this reads {FORMAT}")
            self.at = datetime.fromisoformat(header["at"]).astimezone(UTC)
            self.has_all_checkpoints = header["filter"] is None
            self.has_payloads = bool(header["payloads"])
        except _MALFORMED as error:
            raise error if isinstance(error, NotAnExport) else NotAnExport(f"{path} is not an export") from error

    def seals(self) -> Iterator[Seal]:
        return self._until_malformed(self._seals())

    def histories(self) -> Iterator[History]:
        return self._until_malformed(self._histories())

    def _seals(self) -> Iterator[Seal]:
        self._leaves = sqlite3.connect("")
        self._leaves.execute("CREATE TABLE leaf (run TEXT, checkpoint INTEGER, seq INTEGER, hash TEXT)")
        while line := self._take("checkpoint"):
            stored = line["checkpoint"]
            self._counts["checkpoints"] += 1
            number = int(stored["number"])
            checkpoint = Checkpoint(str(stored["body"]), _unpacked(stored["signature"]))
            yield Seal(number, checkpoint, bool(stored["is_anchored"]), self._leaf_hashes(number))

    def _leaf_hashes(self, checkpoint: int) -> list[bytes]:
        hashes: list[bytes] = []
        leaves: list[tuple[str, int, int, str]] = []
        while line := self._take("leaf"):
            leaf = line["leaf"]
            if isinstance(leaf, str):
                hashes.append(bytes.fromhex(leaf))
            else:
                hashes.append(leaf_hash(Leaf(UUID(leaf["run"]), leaf["seq"], bytes.fromhex(leaf["hash"])).encoded))
                leaves.append((leaf["run"], checkpoint, leaf["seq"], leaf["hash"]))
        self._leaves.executemany("INSERT INTO leaf VALUES (?, ?, ?, ?)", leaves)
        self._counts["leaves"] += len(hashes)
        return hashes

    def _histories(self) -> Iterator[History]:
        """Also of runs of which there is nothing but leaves."""
        with closing(self._leaves):
            rows = self._leaves.execute("SELECT run, checkpoint, seq, hash FROM leaf ORDER BY run, seq")
            groups = groupby(rows, lambda row: str(row[0]))
            run_of_leaves, leaves = next(groups, _NO_LEAVES)
            before = ""
            while line := self._take("run"):
                run = line["run"]
                run_id = str(UUID(run["id"]))
                if run_id <= before:
                    raise ValueError("runs are not in order")
                while run_of_leaves < run_id:
                    yield History(run_of_leaves, None, None, _sealed(leaves), ())
                    run_of_leaves, leaves = next(groups, _NO_LEAVES)
                its_leaves: Sequence[Sealed] = ()
                if run_of_leaves == run_id:
                    its_leaves = _sealed(leaves)
                    run_of_leaves, leaves = next(groups, _NO_LEAVES)
                self._counts["runs"] += 1
                yield self._history(run, its_leaves)
                before = run_id
            while run_of_leaves != _NO_LEAVES[0]:
                yield History(run_of_leaves, None, None, _sealed(leaves), ())
                run_of_leaves, leaves = next(groups, _NO_LEAVES)
        self._check_end()

    def _history(self, run: Line, leaves: Sequence[Sealed]) -> History:
        head, run_id = run["head"], run["id"]
        has_payloads = bool(run["payloads"]) if self.has_payloads else None
        events = []
        while self._next.startswith(_EVENT):
            line = self._next
            self._advance()
            payload = self._take("payload") if self._next.startswith(_PAYLOAD) else None
            events.append(_recorded(line, payload, run_id, has_payloads))
            self._counts["payloads"] += payload is not None
        self._counts["events"] += len(events)
        return History(
            run_id,
            None if run["status"] is None else Row(str(run["tenant"]), str(run["status"])),
            None if head is None else (int(head["seq"]), str(head["hash"])),
            leaves,
            events,
        )

    def _check_end(self) -> None:
        is_there = self._next != ""
        end = (self._take("end") or {}).get("end")
        if self.problems:
            return
        if not is_there:
            self.problems.append("the file ends too early: it was cut off")
        elif end != self._counts or self._next:
            self.problems.append(f"the file holds {self._counts}, and says that it holds {end}")

    def _take(self, kind: str) -> Line | None:
        """The next line, where it is of this kind."""
        if not self._next.startswith(f'{{"{kind}":'):
            return None
        line: Line = json.loads(self._next)
        self._advance()
        return line

    def _advance(self) -> None:
        self._next = next(self._lines, "")

    def _read(self, path: Path) -> Iterator[str]:
        with path.open("rb") as file:
            is_compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with gzip.open(file) if is_compressed else file as lines:
                try:
                    for self._number, line in enumerate(lines, 1):
                        yield line.decode()
                except (EOFError, zlib.error, gzip.BadGzipFile):
                    self.problems.append("the compressed file is damaged or cut off")

    def _until_malformed(self, items: Iterator[T]) -> Iterator[T]:
        try:
            yield from items
        except _MALFORMED:
            self.problems.append(
                f"line {self._number} or the one before it is not what belongs there: reading ends here"
            )
            self._next, self._lines = "", iter(())


def _unpacked(signature: str) -> bytes:
    """Of several texts that decode alike, only the usual one is taken."""
    unpacked = base64.b64decode(signature, validate=True)
    if base64.b64encode(unpacked).decode() != signature:
        raise ValueError("not what was exported")
    return unpacked


def _recorded(line: str, payload: Line | None, run_id: str, has_payloads: bool | None) -> Recorded:
    if line[_HASH_END:_EVENT_BEGIN] != _BETWEEN or line[-2:] != "}\n":
        raise ValueError("not an event")
    text = line[_EVENT_BEGIN:-2]
    event, end = _DECODER.raw_decode(text)
    if end != len(text) or event["run_id"] != run_id:
        raise ValueError("not an event of this run")
    salt = said = None
    if payload is not None:
        salt, said = str(payload["salt"]), str(payload["payload"])
        bytes.fromhex(salt), said.encode()
    return Recorded(
        int(event["seq"]),
        str(event["at"]),
        str(event["tenant"]),
        str(event["kind"]),
        event["payload_sha256"],
        event["previous"],
        text,
        line[_HASH_BEGIN:_HASH_END],
        payload is not None if has_payloads else None,
        salt,
        said,
    )


_EVENT = '{"hash":"'
_PAYLOAD = '{"payload":'
_BETWEEN = '","event":'
_HASH_BEGIN = len(_EVENT)
_HASH_END = _HASH_BEGIN + 64
_EVENT_BEGIN = _HASH_END + len(_BETWEEN)
_DECODER = json.JSONDecoder()

_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, sqlite3.Error)
"""What reading a line raises that somebody has changed."""
_NO_LEAVES: tuple[str, Iterator[Any]] = ("~", iter(()))
"""Behind every run's id."""


def _sealed(leaves: Iterator[tuple[str, int, int, str]]) -> list[Sealed]:
    return [Sealed(checkpoint, seq, digest) for _, checkpoint, seq, digest in leaves]
