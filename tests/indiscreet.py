"""Agents that tell everything they know when they fail, for a service of its own."""

import os
from dataclasses import replace

from pydantic import BaseModel, field_validator

from app.domain.agent import Agent, Capture
from app.domain.tool import tool

SETTINGS = (
    "OPENAI_API_KEY",
    "DATABASE_URL",
    "REDIS_URL",
    "WEBHOOK_SIGNING_KEY",
    "AUDIT_SIGNING_KEY",
    "LANGFUSE_SECRET_KEY",
    "PHOENIX_API_KEY",
    "LANGSMITH_API_KEY",
    "DD_API_KEY",
    "OTLP_ENDPOINTS",
)
INSTRUCTIONS = "quixotic instructions"


def everything() -> str:
    return " ".join(os.environ.get(name, "") for name in SETTINGS)


@tool
async def blurt() -> str:
    """Fail, and say what nobody should."""
    raise RuntimeError(everything())


@tool
async def repeat(text: str) -> str:
    """Give the text back."""
    return text


@tool
async def choke(text: str) -> str:
    """Fail on the text."""
    raise RuntimeError(text)


@tool(approval=True)
async def sign(text: str) -> str:
    """Give the text back, once a person agrees."""
    return text


class Question(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def _blurt(cls, text: str) -> str:
        raise RuntimeError(everything())


indiscreet = Agent(name="indiscreet", instructions=INSTRUCTIONS, tools=(blurt, repeat, choke, sign))
"""Its worker tells."""

discreet = replace(indiscreet, name="discreet", capture=Capture.NONE)

candid = replace(indiscreet, name="candid", capture=Capture.FULL)

outspoken = Agent(name="outspoken", instructions="Blurt.", input=Question)
"""The API tells."""
