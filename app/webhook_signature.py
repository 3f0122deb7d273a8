"""How messages to webhooks are signed: as Standard Webhooks has it, with a secret for each webhook.

A webhook's secret is derived from the setting `WEBHOOK_SIGNING_KEY` and its id, so none is stored. Who replaces the
setting replaces the secret of every webhook.
"""

import base64
import hmac
import secrets
from uuid import UUID

_PURPOSE = b"agent-service webhook secret 1:"
_PREFIX = "whsec_"


def new_signing_key() -> str:
    """A value for `WEBHOOK_SIGNING_KEY`."""
    return secrets.token_urlsafe(32)


def derive_secret(signing_key: str, webhook_id: UUID) -> bytes:
    """32 bytes that nobody can tell from random ones who does not know the key."""
    return hmac.digest(signing_key.encode(), _PURPOSE + webhook_id.bytes, "sha256")


def write_secret(secret: bytes) -> str:
    """As its owner is shown it, and as the libraries that verify signatures take it."""
    return _PREFIX + base64.b64encode(secret).decode()


def sign(secret: bytes, message_id: str, timestamp: int, body: str) -> str:
    """The header `webhook-signature`. `timestamp`: of this attempt, in seconds since 1970."""
    signed = hmac.digest(secret, f"{message_id}.{timestamp}.{body}".encode(), "sha256")
    return f"v1,{base64.b64encode(signed).decode()}"
