"""An agent whose tool tells everything it knows when it fails, for a service of its own."""

import os

from app.domain.agent import Agent
from app.domain.tool import tool


@tool
async def blurt() -> str:
    """Fail, and say what nobody should."""
    settings = ("OPENAI_API_KEY", "DATABASE_URL", "REDIS_URL", "WEBHOOK_SIGNING_KEY", "AUDIT_SIGNING_KEY")
    raise RuntimeError(" ".join(os.environ.get(name, "") for name in settings))


indiscreet = Agent(name="indiscreet", instructions="Blurt.", tools=(blurt,))
