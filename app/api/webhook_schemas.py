"""The shapes of webhooks, of their deliveries, and of what is sent to them."""

from datetime import datetime
from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from app.api.schemas import Answer
from app.domain.egress import MAX_URL_CHARS
from app.domain.run import RunStatus, StopReason
from app.domain.webhook import Delivery as DomainDelivery
from app.domain.webhook import DeliveryError, DeliveryStatus, WebhookEvent
from app.domain.webhook import Webhook as DomainWebhook

EventName = Literal["run.waiting", "run.succeeded", "run.failed", "run.cancelled"]
ALL_EVENTS: tuple[EventName, ...] = ("run.waiting", "run.succeeded", "run.failed", "run.cancelled")


class CreateWebhook(BaseModel):
    """An endpoint of yours, and what it wants to be told of your tenant's runs."""

    model_config = ConfigDict(strict=True, extra="forbid")

    url: str = Field(
        min_length=1,
        max_length=MAX_URL_CHARS,
        description="https, and on the public internet. Redirects count as failed.",
        json_schema_extra={"pattern": r"^https?://[^\s@\\]+$"},  # what is wrong with one, `read_url` says better
    )
    events: Annotated[list[EventName], Field(min_length=1, max_length=16)] = Field(
        default_factory=lambda: list(ALL_EVENTS), description="All of them, if it is left out."
    )


class Webhook(Answer):
    """An endpoint that is told of runs. It is told nothing more once it is disabled."""

    id: UUID
    url: str
    events: list[WebhookEvent]
    created_at: datetime
    created_by: str
    failing_since: datetime | None = Field(
        description="Nothing was delivered from then on; null: the last message was."
    )
    disabled_at: datetime | None
    disabled_why: str | None = Field(description="It answered 410, or nothing could be delivered for five days.")

    @classmethod
    def of(cls, webhook: DomainWebhook) -> Self:
        return cls.model_validate(webhook)


class CreatedWebhook(Webhook):
    """A new webhook with its secret, which is shown this once."""

    secret: str = Field(
        pattern="^whsec_[A-Za-z0-9+/]{43}=$",
        description="Verify messages with it, as Standard Webhooks has it: `webhook-signature` is `v1,` and the base64"
        " of the HMAC-SHA256 of `webhook-id`, `webhook-timestamp` and the body, joined with dots.",
    )


class WebhookList(Answer):
    """Newest first."""

    data: list[Webhook]
    next_cursor: str | None


class Delivery(Answer):
    """A message to one webhook about one run, and what became of it."""

    id: UUID = Field(description="The message's `webhook-id`: the same on every attempt.")
    webhook_id: UUID
    run_id: UUID
    event: WebhookEvent
    status: DeliveryStatus
    attempts: int = Field(description="Since it was made, or asked for again.")
    last_status: int | None = Field(description="HTTP status of the last attempt's answer; null: there was none.")
    last_error: DeliveryError | None = Field(description="Why the last attempt did not work, or why there is none.")
    next_attempt_at: datetime | None = Field(description="Null once it has ended.")
    created_at: datetime
    ended_at: datetime | None

    @classmethod
    def of(cls, delivery: DomainDelivery) -> Self:
        return cls.model_validate(delivery)


class DeliveryList(Answer):
    """Newest first. What ended more than thirty days ago is not kept."""

    data: list[Delivery]
    next_cursor: str | None

    @classmethod
    def of(cls, deliveries: list[DomainDelivery], next_cursor: str | None) -> Self:
        return cls(data=[Delivery.of(delivery) for delivery in deliveries], next_cursor=next_cursor)


class MessageData(BaseModel):
    """Which run, and how it stands. Read the run for all else."""

    run_id: UUID
    agent: str
    status: RunStatus
    stop_reason: StopReason | None


class WebhookMessage(BaseModel):
    """What is posted to a webhook, at least once, in no particular order. Answer with 2xx within ten seconds."""

    type: WebhookEvent
    timestamp: datetime = Field(description="When it happened; `webhook-timestamp` is when this attempt was made.")
    data: MessageData
