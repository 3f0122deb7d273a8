"""What is written down for later: one append-only event for each decision and transition."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from pydantic import JsonValue


class AuditKind(StrEnum):
    """What happened. Payloads stay in the steps; events carry digests and versions."""

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


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """An event that is about to be appended, in the transaction of what it records."""

    kind: AuditKind
    data: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """A recorded event. `seq` counts from 1 in each run, without gaps. `actor` is `key:…`, `worker:…` or `sweeper`."""

    run_id: UUID
    seq: int
    at: datetime
    actor: str
    kind: str
    data: dict[str, JsonValue]
