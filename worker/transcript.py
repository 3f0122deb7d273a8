"""The conversation that a model is shown, made from the run's recorded steps."""

import json
from functools import cache

from app.domain.agent import Agent
from app.domain.canonical import canonical_json
from app.domain.data import as_data
from app.domain.run import Run
from app.domain.step import ToolState, ToolStep
from worker.llm.base import Message
from worker.state import RunState

_BYTES_OVERHEAD = 16
"""Tokens that a message costs beside its text, generously."""


def transcript(state: RunState) -> list[Message]:
    """Instructions, input, then each reply with its results in the order in which the model asked for them."""
    messages = _opening(state.agent, state.run)
    for step in state.steps:
        if isinstance(step, ToolStep):
            messages.append(Message(role="tool", content=shown(step), tool_call_id=step.call_id))
            continue
        messages.append(Message(role="assistant", content=step.content, tool_calls=step.tool_calls))
        if step.correction is not None:
            messages.append(Message(role="user", content=step.correction))
    return messages


def shown(step: ToolStep) -> str:
    """A result as the model reads it. What a tool said is data; what we say, or a person, stands outside of it."""
    result = step.result or ""
    if step.state in (ToolState.SUCCEEDED, ToolState.FAILED) and not step.from_person:
        result = as_data(step.tool, result)
    return f"{step.note}\n{result}" if step.note else result


def _opening(agent: Agent, run: Run) -> list[Message]:
    content = run.input if isinstance(run.input, str) else canonical_json(run.input)
    return [
        Message(role="system", content=agent.render_instructions(run.input)),
        Message(role="user", content=content),
    ]


def most_input_tokens(state: RunState) -> int:
    """The most tokens that the next request can hold: exact up to the last reply, and a byte a token after that."""
    reply = state.last_reply
    if reply is None:
        return _size_of_schemas(state.agent) + sum(_size(message.content) for message in transcript(state))
    results = sum(_size(shown(step)) for step in state.steps if isinstance(step, ToolStep) and step.seq > reply.seq)
    return reply.usage.input_tokens + reply.usage.output_tokens + _size(reply.correction) + results


@cache
def _size_of_schemas(agent: Agent) -> int:
    tools = [[tool.name, tool.description, tool.schema] for tool in agent.tools]
    output = agent.output.model_json_schema() if agent.output else None
    return len(json.dumps([tools, output]).encode())


def _size(content: str | None) -> int:
    return len((content or "").encode()) + _BYTES_OVERHEAD
