"""Agents with flaws, for an API process of their own."""

from pydantic import BaseModel, field_validator

from app.domain.agent import Agent


class Explosive(BaseModel):
    fuse: int

    @field_validator("fuse")
    @classmethod
    def _explode(cls, fuse: int) -> int:
        raise RuntimeError("an internal detail")


class Measurement(BaseModel):
    value: float
    label: str = ""


explosive = Agent(name="explosive", instructions="Answer.", input=Explosive)

measuring = Agent(name="measuring", instructions="Answer.", input=Measurement)
