"""What is written down for later: one append-only event for each decision and transition, chained by hashes.

An event's `data` says what happened, in digests, versions and names. What people and models wrote is its `payload`,
kept beside it and bound by a salted hash, so that it can be erased and the chain still holds.
"""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from pydantic import JsonValue


class AuditKind(StrEnum):
    """What happened."""

    RUN_ACCEPTED = "run.accepted"
    RUN_CLAIMED = "run.claimed"
    RUN_REQUEUED = "run.requeued"
    RUN_SUSPENDED = "run.suspended"
    RUN_SUCCEEDED = "run.succeeded"
    RUN_FAILED = "run.failed"
    RUN_CANCELLED = "run.cancelled"
    MODEL_REPLIED = "model.replied"
    TOOL_INTENDED = "tool.intended"
    TOOL_ANSWERED = "tool.answered"
    REVIEW_REQUESTED = "review.requested"
    REVIEW_DECIDED = "review.decided"
    REVIEW_EXPIRED = "review.expired"
    REVIEW_ESCALATED = "review.escalated"
    RUN_READ = "run.read"
    """An operator's key was given personal data of the run."""
    RUN_ERASED = "run.erased"
    """What people and models wrote is gone; the events stay."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """An event that is about to be appended, in the transaction of what it records.

    `data` never holds what a person or a model wrote, nor an unsalted digest of it: that could be guessed. All of that
    is `payload`.
    """

    kind: AuditKind
    data: dict[str, JsonValue] = field(default_factory=dict)
    payload: JsonValue = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """A recorded event. `seq` counts from 1 in each run, without gaps. `actor` is `key:…`, `worker:…`, `sweeper` or
    `operator:…`.

    `hash` (SHA-256, hex) is over the event and the hash of the one before it: see `app.audit.proof`.
    `payload_sha256` (hex) is over a salt and the payload; None: it has none. An erased `payload` is None, too.
    """

    run_id: UUID
    seq: int
    at: datetime
    actor: str
    kind: str
    data: dict[str, JsonValue]
    payload_sha256: str | None
    payload: JsonValue
    hash: str
