"""Verifies the audit, whatever it is read from: the database or an export.

One pass over the checkpoints, one over the runs in the order of their ids; of both only one at a time is held.
Nothing that a source says is trusted: everything is recomputed, up to the signatures and to what is kept outside.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from .proof import Checkpoint, key_id, payload_hash, root_of
from .report import Check, Report
from .source import History, Recorded, Seal, Source

GRACE = timedelta(minutes=10)
"""How long an event may wait for its checkpoint, and a checkpoint for its anchor, before that is a finding."""


class Anchored:
    """Which checkpoints are kept outside: the digest of each number. A few ten bytes each."""

    def __init__(self, checkpoints: Iterable[Checkpoint] = ()) -> None:
        self.digests: dict[int, str] = {}
        self.conflicts: set[int] = set()
        for checkpoint in checkpoints:
            if self.digests.setdefault(checkpoint.number, checkpoint.digest) != checkpoint.digest:
                self.conflicts.add(checkpoint.number)


def verify(
    source: Source,
    keys: Iterable[Ed25519PublicKey],
    *,
    expected: Anchored | None,
    anchored: Anchored | None,
) -> Report:
    """`keys`: those that signed, of which a checkpoint names one; without any, signatures are not checked.

    `expected`: what was anchored before the source's moment, so it has to have it; `anchored`: what was afterwards, so
    it may not have more. None: there is nothing to compare with.
    """
    began = time.perf_counter()
    report = Report()
    seals = _Seals(report, source, {key_id(key): key for key in keys}, anchored)
    for seal in source.seals():
        seals.check(seal)
    if expected:
        seals.compare(expected)
    runs = _Runs(report)
    for history in source.histories():
        runs.check(history)
    if report.checkpoints or seals.keys:
        runs.check_age(written(source.at - GRACE))
    for problem in source.problems:
        report.add(Check.FILE, "", problem)
    report.seconds = time.perf_counter() - began
    return report


_Finding = Callable[[Check, str], None]


class _Seals:
    def __init__(
        self, report: Report, source: Source, keys: Mapping[str, Ed25519PublicKey], anchored: Anchored | None
    ) -> None:
        self.keys = keys
        self._report = report
        self._has_all = source.has_all_checkpoints
        self._long_ago = written(source.at - GRACE)
        self._anchored = anchored
        self._numbers: set[int] = set()
        self._newest = 0
        self._digest: str | None = None

    def check(self, seal: Seal) -> None:
        finding = _about(self._report, f"checkpoint {seal.number}")
        if seal.checkpoint is None:
            return finding(Check.ROOT, f"is missing, and {len(seal.leaves)} leaves of it are there")
        self._report.checkpoints += 1
        self._numbers.add(seal.number)
        content = _content(seal.checkpoint)
        self._check_sequence(seal, content, finding)
        self._check_signature(seal.checkpoint, content, finding)
        if (content.get("heads"), content.get("root")) != (len(seal.leaves), root_of(seal.leaves).hex()):
            finding(Check.ROOT, "its leaves are not those that it was made of")
        if self._anchored:
            self._check_anchor(seal, str(content.get("at")), self._anchored, finding)
        return None

    def _check_sequence(self, seal: Seal, content: Mapping[str, Any], finding: _Finding) -> None:
        assert seal.checkpoint
        if content.get("number") != seal.number:
            finding(Check.SEQUENCE, f"its body has the number {content.get('number')}")
        is_next = seal.number == self._newest + 1
        if self._has_all and not is_next:
            finding(Check.SEQUENCE, f"follows number {self._newest}: those in between are missing")
        if is_next and (self._digest or seal.number == 1) and content.get("previous") != self._digest:
            finding(Check.SEQUENCE, "does not follow from the one before it")
        self._newest, self._digest = seal.number, seal.checkpoint.digest

    def _check_signature(self, checkpoint: Checkpoint, content: Mapping[str, Any], finding: _Finding) -> None:
        if not self.keys:
            return
        key = self.keys.get(str(content.get("key")))
        if key is None:
            finding(Check.SIGNATURE, f"names the key {content.get('key')}, which is none of those to trust")
        elif not checkpoint.is_signed_by(key):
            finding(Check.SIGNATURE, "was not signed by the key that it names")

    def _check_anchor(self, seal: Seal, at: str, anchored: Anchored, finding: _Finding) -> None:
        assert seal.checkpoint
        digest = anchored.digests.get(seal.number)
        if digest is None:
            self._report.unanchored += 1
            if seal.is_anchored:
                finding(Check.ANCHOR, "was anchored and is not there any more")
            elif at < self._long_ago:
                finding(Check.ANCHOR, f"is of {at} and was never anchored")
        elif digest != seal.checkpoint.digest or seal.number in anchored.conflicts:
            finding(Check.ANCHOR, "another one is anchored under its number")

    def compare(self, expected: Anchored) -> None:
        """The other way round: does the source have what is anchored?"""
        for number in sorted(expected.digests.keys() - self._numbers) if self._has_all else ():
            finding = _about(self._report, f"checkpoint {number}")
            if number > self._newest:
                finding(Check.ANCHOR, "is anchored, and newer than all that are here: an old backup was restored")
            else:
                finding(Check.ANCHOR, "is anchored, and missing here")


class _Runs:
    def __init__(self, report: Report) -> None:
        self._report = report
        self._oldest_run = ""

    def check(self, history: History) -> None:
        finding = _about(self._report, history.run_id)
        self._report.runs += 1
        self._report.events += len(history.events)
        last = history.events[-1] if history.events else None
        if history.head != (last and (last.seq, last.hash)):
            has = f"names event {history.head[0]}" if history.head else "is missing"
            finding(Check.HEAD, f"its head {has}, and {_name(last)} is its last")
        self._check_leaves(history, finding)
        if last:
            status = self._check_chain(history, finding)
            self._check_row(history, status, finding)
            if last.has_payload is not None:
                self._check_payloads(history, finding)
        elif history.row:
            finding(Check.RUN, "has no audit")

    def _check_chain(self, history: History, finding: _Finding) -> str | None:
        """Returns the state that the run has by its events."""
        seq, previous, status, tenant = 0, None, None, history.events[0].tenant
        sha256 = hashlib.sha256
        for event in history.events:
            seq += 1
            if event.seq != seq:  # what the event was hashed with is not here
                missing = f"{seq}" if event.seq == seq + 1 else f"{seq} to {event.seq - 1}"
                finding(Check.CHAIN, f"{missing} missing before {_name(event)}")
                seq = event.seq
            elif event.previous != previous:
                finding(Check.CHAIN, f"{_name(event)} was hashed as the successor of another one")
            elif sha256(event.text.encode()).hexdigest() != event.hash:
                finding(Check.CHAIN, f"{_name(event)} is not what was hashed")
            if event.tenant != tenant:
                finding(Check.CHAIN, f"{_name(event)} is another tenant's")
            previous = event.hash
            status = _STATUS.get(event.kind, status)
        return status

    def _check_payloads(self, history: History, finding: _Finding) -> None:
        erased = max((event.seq for event in history.events if event.kind == "run.erased"), default=0)
        for event in history.events:
            if event.payload is not None and event.salt is not None and event.payload_sha256 is not None:
                self._report.payloads += 1
                if payload_hash(bytes.fromhex(event.salt), event.payload).hex() != event.payload_sha256:
                    finding(Check.PAYLOAD, f"the payload of {_name(event)} is not what was hashed")
            if event.has_payload and event.payload_sha256 is None:
                finding(Check.PAYLOAD, f"{_name(event)} was recorded without the payload that it has")
            elif event.has_payload and event.seq < erased:
                finding(Check.PAYLOAD, f"the payload of {_name(event)} is there, and event {erased} says it was erased")
            elif event.has_payload is False and event.payload_sha256 is not None and event.seq > erased:
                finding(Check.PAYLOAD, f"the payload of {_name(event)} is missing, and was not erased")

    def _check_leaves(self, history: History, finding: _Finding) -> None:
        sealed = 0
        if history.leaves:
            hashes = {event.seq: event.hash for event in history.events}
            for leaf in history.leaves:
                if leaf.seq not in hashes:
                    finding(Check.LEAF, f"event {leaf.seq} was sealed by checkpoint {leaf.checkpoint} and is missing")
                elif hashes[leaf.seq] != leaf.hash:
                    finding(Check.LEAF, f"event {leaf.seq} is another one than checkpoint {leaf.checkpoint} sealed")
                sealed = max(sealed, leaf.seq)
        unsealed = [event.at for event in history.events if event.seq > sealed]
        self._report.unsealed += len(unsealed)
        if unsealed and (self._report.unsealed_since is None or unsealed[0] < self._report.unsealed_since):
            self._report.unsealed_since, self._oldest_run = unsealed[0], history.run_id

    def _check_row(self, history: History, status: str | None, finding: _Finding) -> None:
        if history.row is None:
            finding(Check.RUN, "has an audit, and there is no such run")
        elif history.row.tenant != history.events[0].tenant:
            finding(Check.RUN, f"is {history.row.tenant}'s, and by its audit {history.events[0].tenant}'s")
        elif history.row.status != status:
            finding(Check.RUN, f"is {history.row.status}, and by its audit {status}")

    def check_age(self, long_ago: str) -> None:
        since = self._report.unsealed_since
        if since is not None and since < long_ago:
            minutes = int(GRACE.total_seconds() // 60)
            sentence = f"has events since {since} that no checkpoint covers: more than {minutes} minutes"
            self._report.add(Check.UNSEALED, self._oldest_run, sentence)


_STATUS = {
    "run.accepted": "queued",
    "run.claimed": "running",
    "run.requeued": "queued",
    "run.suspended": "waiting",
    "run.succeeded": "succeeded",
    "run.failed": "failed",
    "run.cancelled": "cancelled",
}
"""The state that a run has after an event of this kind."""


def _about(report: Report, subject: str) -> _Finding:
    return lambda check, sentence: report.add(check, subject, sentence)


def _name(event: Recorded | None) -> str:
    return f"event {event.seq} ({event.kind})" if event else "none"


def _content(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a checkpoint states, or nothing where somebody has put something else there."""
    try:
        content = checkpoint.content
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def written(moment: datetime) -> str:
    """As events and checkpoints write it, so that texts compare like times."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
