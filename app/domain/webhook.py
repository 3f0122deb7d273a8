"""Webhooks: whom a tenant wants to be told of its runs, and what became of each message."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

MAX_WEBHOOKS = 10
"""Of one tenant."""


class WebhookEvent(StrEnum):
    """What a webhook may be told: `run.` and the state that a run has come to."""

    WAITING = "run.waiting"
    """A person has to decide. Again each time that this is so."""
    SUCCEEDED = "run.succeeded"
    FAILED = "run.failed"
    CANCELLED = "run.cancelled"


class DeliveryStatus(StrEnum):
    PENDING = "pending"
    """It is sent, now or later."""
    DELIVERED = "delivered"
    """The endpoint has answered with a status of 2xx."""
    FAILED = "failed"
    """It is not tried any more; `last_error` says why."""


class DeliveryError(StrEnum):
    """Why an attempt did not work, or why there is none any more. Tells nothing of the network."""

    REFUSED = "refused"
    """The service does not connect to this address."""
    NO_ANSWER = "no_answer"
    """No connection, no answer in time, or one that is not HTTP."""
    BAD_STATUS = "bad_status"
    """An answer with another status than 2xx. A redirect is not followed."""
    GONE = "gone"
    """The answer was 410: the endpoint wants no messages any more, and its webhook is disabled."""
    WEBHOOK_DISABLED = "webhook_disabled"
    WEBHOOK_DELETED = "webhook_deleted"
    INTERNAL = "internal"
    """A bug; the log has it under the delivery's id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """An endpoint of a tenant's. `failing_since`: no message has been delivered from then on; None: the last one was.

    A webhook that is disabled is told nothing more.
    """

    id: UUID
    tenant: str
    url: str
    events: tuple[WebhookEvent, ...]
    created_at: datetime
    created_by: str
    failing_since: datetime | None
    disabled_at: datetime | None
    disabled_why: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A message to one webhook about one transition of a run.

    `last_status`: of the last attempt's answer, where there was one. `next_attempt_at`: None once it has ended; while
    it is being sent, when somebody else will send it, should nothing be heard.
    """

    id: UUID
    webhook_id: UUID
    run_id: UUID
    event: WebhookEvent
    status: DeliveryStatus
    attempts: int
    last_status: int | None
    last_error: DeliveryError | None
    next_attempt_at: datetime | None
    created_at: datetime
    ended_at: datetime | None
