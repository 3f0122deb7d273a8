"""A model's final answer: does it fit what the agent promises, and what is the model told when it does not?"""

from pydantic import JsonValue, ValidationError

from app.domain.agent import Agent
from app.domain.canonical import storable
from worker.explain import explain


def read_output(agent: Agent, content: str | None) -> JsonValue:
    """The answer as the API gives it: text, or what the agent's output model makes of it.

    Raises `pydantic.ValidationError` where it does not fit.
    """
    if agent.output is None:
        return content
    return storable(agent.output.model_validate_json(content or "").model_dump(mode="json"))


def correction(agent: Agent, content: str | None, finish_reason: str) -> str | None:
    """What to tell the model when its answer cannot be used; None when it can."""
    if finish_reason == "length":
        return "Your reply was cut off because it was too long. Answer again, shorter."
    if not content or not content.strip():
        return "Your reply was empty. Answer the task."
    try:
        read_output(agent, content)
    except ValidationError as error:
        problems = explain(error, whole="answer")
        return f"Your answer does not fit the required JSON schema: {problems}. Answer again with JSON only."
    return None
