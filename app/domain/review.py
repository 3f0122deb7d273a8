"""What a person is asked, and what they may answer."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from pydantic import JsonValue


class ReviewKind(StrEnum):
    """Why a person is asked."""

    APPROVAL = "approval"
    """The tool declares that this call needs approval."""
    IN_DOUBT = "in_doubt"
    """A ONCE call was interrupted: it may or may not have happened."""


class ReviewStatus(StrEnum):
    PENDING = "pending"
    """Waits for a decision."""
    DECIDED = "decided"
    """Somebody decided; never changes again."""
    EXPIRED = "expired"
    """Nobody decided in time."""
    VOID = "void"
    """The run ended otherwise; there is nothing left to decide."""


class Decision(StrEnum):
    """What a person may decide."""

    APPROVE = "approve"
    """Make the call. For one in doubt: it did not happen, make it."""
    REJECT = "reject"
    """Do not make the call; the model is told the reason, or the run ends. For one in doubt: it did not happen."""
    RESPOND = "respond"
    """Only for a call in doubt: it happened, and this was its result."""


DECISIONS: dict[ReviewKind, frozenset[Decision]] = {
    ReviewKind.APPROVAL: frozenset({Decision.APPROVE, Decision.REJECT}),
    ReviewKind.IN_DOUBT: frozenset({Decision.APPROVE, Decision.REJECT, Decision.RESPOND}),
}
"""Which decisions make sense for which kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewRequest:
    """A question that a suspended run asks: about the tool call that is, or would be, step `seq`.

    `args_hash` pins what the person saw: SHA-256 (hex) of the canonical arguments.
    """

    kind: ReviewKind
    seq: int
    tool: str
    arguments: JsonValue
    args_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """One row of the table `reviews`."""

    id: UUID
    tenant: str
    run_id: UUID
    agent: str
    kind: ReviewKind
    seq: int
    tool: str
    arguments: JsonValue
    args_hash: str
    status: ReviewStatus
    decision: Decision | None
    reason: str | None
    response: str | None
    decided_by: str | None
    created_at: datetime
    decided_at: datetime | None
    expires_at: datetime
