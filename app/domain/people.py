"""Asking a person: the tool that an agent lists where its model may do so."""

from dataclasses import replace
from typing import Annotated

from pydantic import Field, StringConstraints

from app.domain.tool import tool

_Question = Annotated[str, StringConstraints(min_length=1, max_length=4_000, pattern=r"\S")]
_Option = Annotated[str, StringConstraints(min_length=1, max_length=500)]
_Options = Annotated[list[_Option], Field(min_length=1, max_length=20)]


@tool
async def ask_human(question: _Question, options: _Options | None = None) -> str:
    """Ask a person and wait for the answer. Ask what no other tool can tell you and what you must not guess.

    Args:
        question: The question, with everything that a person who has not seen this conversation needs to answer it.
        options: Answers to choose from, where there are only so many. The person may answer otherwise.
    """
    raise NotImplementedError("a person answers this, the service never calls it")


ask_human = replace(ask_human, asks_person=True)
