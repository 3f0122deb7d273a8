"""What a verification found, as data and as text."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

MOST = 100
"""Findings that are listed; the others are counted."""


class Check(StrEnum):
    """What is compared with what."""

    CHAIN = "chain"
    """Each event with its hash, and with the event before it: no gap, one order, one tenant."""
    HEAD = "head"
    """The row that names the last event of a run with that event."""
    LEAF = "leaf"
    """What a checkpoint saw of a run with the run's event of that number."""
    ROOT = "root"
    """All leaves of a checkpoint with the root that it states."""
    SIGNATURE = "signature"
    """A checkpoint with the public key."""
    SEQUENCE = "sequence"
    """A checkpoint with the one before it: its number, and the hash of its body."""
    ANCHOR = "anchor"
    """The database's checkpoints with those that are kept outside of it."""
    PAYLOAD = "payload"
    """What people and models wrote with its salted hash; and whether it is there, unless it was erased."""
    RUN = "run"
    """The state of a run with the last event that changes it; and that each has the other."""
    UNSEALED = "unsealed"
    """Events that no checkpoint has seen: how many, and since when."""
    FILE = "file"
    """An export with what it says that it holds."""


class Finding(NamedTuple):
    """Something that does not hold. `subject`: a run's id, `checkpoint 7`, or empty."""

    check: Check
    subject: str
    sentence: str


@dataclass(slots=True)
class Report:
    """`found` counts the findings, of which the first are listed. `warnings`: what would let somebody tamper.
    `notes`: what was not checked.

    `unsealed` events are not covered by a checkpoint yet, the oldest since `unsealed_since` (UTC);
    `unanchored` checkpoints are not kept outside yet.
    """

    events: int = 0
    runs: int = 0
    checkpoints: int = 0
    payloads: int = 0
    unsealed: int = 0
    unsealed_since: str | None = None
    unanchored: int = 0
    seconds: float = 0.0
    found: int = 0
    findings: list[Finding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.found

    def add(self, check: Check, subject: str, sentence: str) -> None:
        self.found += 1
        if len(self.findings) < MOST:
            self.findings.append(Finding(check, subject, sentence))

    def as_json(self) -> dict[str, Any]:
        return {"holds": self.holds, **asdict(self), "findings": [finding._asdict() for finding in self.findings]}

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        for check, subject, sentence in self.findings:
            yield f"{check:9}  {subject + ': ' if subject else ''}{sentence}"
        if self.found > len(self.findings):
            yield f"… and {self.found - len(self.findings):,} more"
        yield from (f"warning: {warning}" for warning in self.warnings)
        speed = f", {self.events / self.seconds:,.0f} events/s" if self.seconds else ""
        yield (
            f"Checked {self.events:,} events of {self.runs:,} runs, {self.payloads:,} payloads and "
            f"{self.checkpoints:,} checkpoints in {self.seconds:.1f} s{speed}."
        )
        since = f", the oldest of {self.unsealed_since}" if self.unsealed else ""
        yield f"Not sealed yet: {self.unsealed:,} events{since}. Not anchored yet: {self.unanchored:,} checkpoints."
        yield from (f"Not checked: {note}." for note in self.notes)
        yield "Everything that was checked holds." if self.holds else f"{self.found:,} findings."
