"""What the spans of a run say: attributes by their names in `semconv`. None: nothing is to be said, or may be shown.

`input.value` and `output.value` come in pairs: Langfuse takes them together, or looks elsewhere for both.
"""

import json
from collections.abc import Mapping

from opentelemetry.util.types import AttributeValue
from pydantic import JsonValue

from app.domain.review import Review
from app.domain.run import Run, RunStatus
from app.domain.step import ToolState, ToolStep
from worker import semconv
from worker.content import Content, input_message, output_message
from worker.llm.base import ModelReply

Attributes = Mapping[str, AttributeValue | None]

UNKNOWN_TOOL = "(unknown)"
FAILURES = frozenset({ToolState.FAILED, ToolState.CRASHED, ToolState.INVALID, ToolState.IN_DOUBT, ToolState.INTENDED})
"""`INTENDED`: it was broken off."""
_JSON, _TEXT = "application/json", "text/plain"


def of_every_span(run: Run, content: Content) -> Attributes:
    """By what a run is found, in whatever back end. Any `gen_ai.` name keeps a span from being filtered out there."""
    session = content.text(run.metadata.get("session_id"))
    return {
        semconv.RUN_ID: str(run.id),
        semconv.TENANT: run.tenant,
        semconv.AGENT_NAME: run.agent,
        semconv.AGENT_VERSION: run.agent_version,
        semconv.REQUEST_ID: run.request_id,
        semconv.LANGFUSE_TRACE_NAME: run.agent,
        semconv.LANGFUSE_VERSION: run.agent_version,
        semconv.USER_ID: content.text(run.metadata.get("user_id")),
        semconv.SESSION_ID: session,
        semconv.CONVERSATION_ID: session,
    }


def of_root(run: Run, content: Content) -> Attributes:
    """What became of the run. What its calls used has names of our own here, so that nobody adds it up twice."""
    usage = run.usage
    asked = content.value(run.input)
    answered = None if run.output is None else content.value(run.output)
    times = {"queued": run.time.queued_ms, "model": run.time.model_ms, "tools": run.time.tools_ms}
    return {
        semconv.KIND: "AGENT",
        semconv.LANGSMITH_KIND: "chain",
        semconv.LANGFUSE_IS_ROOT: True,
        semconv.OPERATION: "invoke_agent",
        semconv.PROVIDER: semconv.OPENAI,
        semconv.STATUS: run.status,
        semconv.STOP_REASON: run.stop_reason,
        semconv.ATTEMPT: run.attempt,
        semconv.ERROR_TYPE: run.stop_reason if run.status is RunStatus.FAILED else None,
        semconv.RUN_MODEL_CALLS: usage.model_calls,
        semconv.RUN_INPUT_TOKENS: usage.input_tokens,
        semconv.RUN_CACHED_TOKENS: usage.cached_tokens,
        semconv.RUN_OUTPUT_TOKENS: usage.output_tokens,
        semconv.RUN_COST: None if usage.cost_usd is None else float(usage.cost_usd),
        **{semconv.RUN_TIME.format(name): ms for name, ms in {**times, "human": run.time.human_ms}.items()},
        **{
            semconv.LANGFUSE_METADATA.format(content.text(name)): content.text(value)
            for name, value in run.metadata.items()
        },
        semconv.INPUT_MESSAGES: input_message(asked),
        semconv.OUTPUT_MESSAGES: output_message(answered),
        **_pair(run.input, asked, run.output, answered or content.text(run.error or run.stop_reason or run.status)),
    }


def of_reply(reply: ModelReply, cost_usd: float | None, content: Content) -> Attributes:
    """What a model gave, and what it took."""
    usage = reply.usage
    parts = {
        "input": usage.input_tokens - usage.cached_tokens,
        "input_cached_tokens": usage.cached_tokens,
        "output": usage.output_tokens,
    }
    return {
        semconv.RESPONSE_MODEL: reply.model,
        semconv.RESPONSE_ID: reply.id,
        semconv.FINISH_REASONS: (reply.finish_reason,),
        semconv.INPUT_TOKENS: usage.input_tokens,
        semconv.CACHED_TOKENS: usage.cached_tokens,
        semconv.CACHE_READ: usage.cached_tokens,
        semconv.OUTPUT_TOKENS: usage.output_tokens,
        # Some versions of Langfuse count the cached tokens on top of the input that they are a part of.
        semconv.LANGFUSE_USAGE: json.dumps(parts),
        semconv.COST: cost_usd,
        semconv.COST_OF_PHOENIX: cost_usd,
        semconv.OUTPUT_MESSAGES: content.reply(reply),
    }


def of_tool_call(step: ToolStep, name: str, *, is_known: bool, content: Content) -> Attributes:
    """A call and its result. A name or an id that the model made up is content."""
    arguments, result = content.value(step.arguments), content.text(step.result)
    return {
        semconv.KIND: "TOOL",
        semconv.OPERATION: "execute_tool",
        semconv.TOOL_NAME: name,
        semconv.TOOL_TYPE: "function",
        semconv.TOOL_CALL_ID: content.text(step.call_id),
        semconv.TOOL_ARGUMENTS: arguments,
        semconv.TOOL_RESULT: result,
        semconv.TOOL_STATE: step.state,
        semconv.TOOL_EFFECT: step.effect if is_known else None,
        semconv.STEP: step.seq,
        semconv.ERROR_TYPE: step.state if step.state in FAILURES else None,
        **_pair(step.arguments, arguments, step.result, result or step.state),
    }


def of_review(review: Review, content: Content) -> Attributes:
    """What a person was asked, and said. Not by the names of tool calls: they would make a call of it."""
    outcome = review.decision or review.status
    answer = review.response or review.reason
    answered = None if answer is None else content.value(answer)
    return {
        semconv.KIND: "CHAIN",
        semconv.LANGSMITH_KIND: "chain",
        semconv.REVIEW_ID: str(review.id),
        semconv.REVIEW_KIND: review.kind,
        semconv.REVIEW_TOOL: review.tool,
        semconv.REVIEW_OUTCOME: outcome,
        semconv.REVIEWER: review.decided_by,
        **_pair(review.arguments, content.value(review.arguments), answer, answered or outcome),
    }


def _pair(asked: JsonValue, shown: str | None, answered: JsonValue, shown_answer: str | None) -> Attributes:
    """What went in and what came out, each with how it may be shown; nothing of either where that is not at all."""
    if shown is None:
        return {}
    return {
        semconv.INPUT: shown,
        semconv.INPUT_TYPE: _TEXT if isinstance(asked, str) else _JSON,
        semconv.OUTPUT: shown_answer,
        semconv.OUTPUT_TYPE: _TEXT if answered is None or isinstance(answered, str) else _JSON,
    }
