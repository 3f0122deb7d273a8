"""What a person is asked, and what they may answer."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from pydantic import JsonValue

from app.domain.agent import OnExpiry
from app.domain.run import StopReason


class ReviewKind(StrEnum):
    """Why a person is asked."""

    APPROVAL = "approval"
    """The tool declares that this call needs approval."""
    IN_DOUBT = "in_doubt"
    """A ONCE call was interrupted: it may or may not have happened."""
    QUESTION = "question"
    """The model asks a person something, with the tool `ask_human`."""
    LIMIT = "limit"
    """The run has reached a limit, and its agent wants a person to say whether it may go on."""


class ReviewStatus(StrEnum):
    PENDING = "pending"
    """Waits for a decision."""
    DECIDED = "decided"
    """Somebody decided; never changes again."""
    EXPIRED = "expired"
    """Nobody decided in time."""
    VOID = "void"
    """The run ended otherwise; there is nothing left to decide."""


class ReviewQueue(StrEnum):
    """Who is asked."""

    FIRST = "first"
    """Whoever may decide reviews."""
    SECOND = "second"
    """Nobody of the first queue decided in time: whoever may decide what was escalated."""


class Decision(StrEnum):
    """What a person may decide."""

    APPROVE = "approve"
    """Do what is proposed: make the call, raise the limit. For a call in doubt: it did not happen, make it."""
    EDIT = "edit"
    """Do it with other arguments. They are validated like the model's, and asked about again where they need it."""
    REJECT = "reject"
    """Do not do it; the model is told the reason, or the run ends. For a call in doubt: it did not happen."""
    RESPOND = "respond"
    """Answer: a question, a call in doubt (it happened, and this was its result), or in the agent's place."""


DECISIONS: dict[ReviewKind, frozenset[Decision]] = {
    ReviewKind.APPROVAL: frozenset({Decision.APPROVE, Decision.EDIT, Decision.REJECT}),
    ReviewKind.IN_DOUBT: frozenset({Decision.APPROVE, Decision.REJECT, Decision.RESPOND}),
    ReviewKind.QUESTION: frozenset({Decision.RESPOND, Decision.REJECT}),
    ReviewKind.LIMIT: frozenset({Decision.APPROVE, Decision.EDIT, Decision.REJECT, Decision.RESPOND}),
}
"""Which decisions make sense for which kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewRequest:
    """A question that a suspended run asks.

    `seq` and `tool`: the step that the call is, or would be; None where it is about the run as a whole (a limit).
    `arguments`: those of the call; of a limit, its proposed new value by its name. `args_hash` pins what the person
    sees: SHA-256 (hex) of both in canonical form. `why`: what stopped the run, a sentence for the reviewer.
    `stop_reason`: how the run ends when a limit is not raised. `editor`: who proposed these arguments by an edit.
    """

    kind: ReviewKind
    seq: int | None
    tool: str | None
    arguments: JsonValue
    args_hash: str
    why: str
    stop_reason: StopReason | None = None
    editor: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """One row of the table `reviews`: see `ReviewRequest`, and what became of it.

    `edited`: the arguments that an edit put in place of those proposed. `barred`: actors who may not decide it, because
    the agent demands four eyes.
    """

    id: UUID
    tenant: str
    run_id: UUID
    agent: str
    kind: ReviewKind
    seq: int | None
    tool: str | None
    arguments: JsonValue
    args_hash: str
    why: str
    stop_reason: StopReason | None
    queue: ReviewQueue
    barred: tuple[str, ...]
    on_expiry: OnExpiry
    expires_s: float
    status: ReviewStatus
    decision: Decision | None
    edited: JsonValue
    reason: str | None
    response: str | None
    decided_by: str | None
    created_at: datetime
    decided_at: datetime | None
    expires_at: datetime
