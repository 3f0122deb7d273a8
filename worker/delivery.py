"""One attempt to deliver a message to a webhook: what is sent, what the answer means, and when to try again."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from random import Random
from typing import Protocol

from app import __version__
from app.db.deliveries import Claimed, Outcome
from app.domain.errors import EgressRefused, ToolError
from app.domain.tool import HttpReply
from app.domain.webhook import DeliveryError
from app.webhook_signature import derive_secret, sign

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0
"""For one attempt, the answer included."""
_GONE = 410


class Sender(Protocol):
    """Posts to addresses that others chose."""

    async def post(self, url: str, body: bytes, *, headers: Mapping[str, str], timeout_s: float) -> HttpReply:
        """Raises `EgressRefused`, and `ToolError` where nobody answers."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySchedule:
    """`waits`: seconds before each further attempt, as Standard Webhooks recommends; after the last one a delivery has
    failed. A wait is longer by up to `jitter` of it. `longest_wait_s`: what an endpoint may ask for, at most.
    """

    waits: tuple[float, ...] = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
    jitter: float = 0.1
    longest_wait_s: float = 86_400

    def wait(self, attempt: int, retry_after: float, random: Random) -> float | None:
        """Seconds until the next attempt after this one, counted from 1; None: there is none.

        `retry_after`: before so many seconds the endpoint does not want another one.
        """
        if attempt > len(self.waits):
            return None
        scheduled = self.waits[attempt - 1] * (1 + random.uniform(0, self.jitter))
        return max(scheduled, min(retry_after, self.longest_wait_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Courier:
    """Takes messages to webhooks, signed."""

    sender: Sender
    signing_key: str
    schedule: RetrySchedule
    random: Random

    async def attempt(self, claimed: Claimed) -> Outcome:
        """Send it once. Never raises: whatever happens is an outcome."""
        status, asked = None, 0.0
        try:
            reply = await self.sender.post(
                claimed.url, claimed.body.encode(), headers=self._headers(claimed), timeout_s=TIMEOUT_SECONDS
            )
            status, error = reply.status, _error_of(reply)
            if error is not None:
                asked = read_retry_after(reply.retry_after, now=datetime.now(UTC))
        except EgressRefused:
            error = DeliveryError.REFUSED
        except ToolError:
            error = DeliveryError.NO_ANSWER
        except Exception as bug:  # noqa: BLE001 - one message must not end the delivery of all others
            # Without its text and its traceback: they may quote the address, which may hold a token.
            fields = {"delivery": str(claimed.id), "error": type(bug).__name__}
            logger.error("webhook delivery crashed", extra={"fields": fields})  # noqa: TRY400
            error = DeliveryError.INTERNAL
        is_last = error in (None, DeliveryError.GONE)
        wait = None if is_last else self.schedule.wait(claimed.attempt, asked, self.random)
        return Outcome(id=claimed.id, attempt=claimed.attempt, status=status, error=error, retry_s=wait)

    def _headers(self, claimed: Claimed) -> dict[str, str]:
        message_id = str(claimed.id)
        secret = derive_secret(self.signing_key, claimed.webhook_id)
        return {
            "content-type": "application/json",
            "user-agent": f"agent-service/{__version__}",
            "webhook-id": message_id,
            "webhook-timestamp": str(claimed.sent_at),
            "webhook-signature": sign(secret, message_id, claimed.sent_at, claimed.body),
        }


def _error_of(reply: HttpReply) -> DeliveryError | None:
    if 200 <= reply.status < 300:
        return None
    return DeliveryError.GONE if reply.status == _GONE else DeliveryError.BAD_STATUS


def read_retry_after(header: str, *, now: datetime) -> float:
    """Seconds, from `Retry-After` in either of its forms; 0 where it says nothing that can be understood."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            at = parsedate_to_datetime(header)
        except (ValueError, OverflowError):
            return 0.0
        seconds = (at.replace(tzinfo=at.tzinfo or UTC) - now).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
