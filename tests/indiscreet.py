"""Agents that tell everything they know when they fail, for a service of its own."""

import os

from pydantic import BaseModel, field_validator

from app.domain.agent import Agent
from app.domain.tool import tool

SETTINGS = (
    "OPENAI_API_KEY",
    "DATABASE_URL",
    "REDIS_URL",
    "WEBHOOK_SIGNING_KEY",
    "AUDIT_SIGNING_KEY",
    "LANGFUSE_SECRET_KEY",
)


def everything() -> str:
    return " ".join(os.environ.get(name, "") for name in SETTINGS)


@tool
async def blurt() -> str:
    """Fail, and say what nobody should."""
    raise RuntimeError(everything())


class Question(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def _blurt(cls, text: str) -> str:
        raise RuntimeError(everything())


indiscreet = Agent(name="indiscreet", instructions="Blurt.", tools=(blurt,))
"""Its worker tells."""

outspoken = Agent(name="outspoken", instructions="Blurt.", input=Question)
"""The API tells."""
