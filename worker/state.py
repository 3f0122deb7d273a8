"""Where a run stands: its recorded steps and what follows from them. Nothing else is kept, so resuming is starting."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue, TypeAdapter, ValidationError

from app.domain.agent import Agent
from app.domain.review import Review
from app.domain.run import Run, RunUsage
from app.domain.step import ModelStep, Step, ToolCall, ToolState, ToolStep
from app.prices import Price

_JSON: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)


@dataclass(frozen=True, slots=True)
class OpenCall:
    """A tool call of the last reply that the model has no result for yet. `step` is its intent, if it got that far."""

    seq: int
    call: ToolCall
    step: ToolStep | None


@dataclass(slots=True)
class RunState:
    """A run in a worker's hands.

    `models` are asked in this order; `prices` holds their prices, None for a model without one.
    `reviews`: those about each step that has any, oldest first. `started_at`: monotonic seconds at the claim.
    """

    run: Run
    agent: Agent
    models: Sequence[str]
    prices: Mapping[str, Price | None]
    steps: list[Step]
    reviews: Mapping[int, Sequence[Review]]
    usage: RunUsage
    started_at: float = field(default_factory=time.monotonic)

    @property
    def next_seq(self) -> int:
        return self.steps[-1].seq + 1 if self.steps else 0

    @property
    def last_reply(self) -> ModelStep | None:
        return next((step for step in reversed(self.steps) if isinstance(step, ModelStep)), None)

    @property
    def answer(self) -> ModelStep | None:
        """The last reply, where it is the final one."""
        reply = self.last_reply
        return reply if reply and not reply.tool_calls and reply.correction is None else None

    def open_calls(self) -> list[OpenCall]:
        """The tool calls that come next, in the order in which the model asked."""
        reply = self.last_reply
        if reply is None:
            return []
        results = {step.seq: step for step in self.steps if isinstance(step, ToolStep)}
        calls = [
            OpenCall(seq, call, results.get(seq)) for seq, call in enumerate(reply.tool_calls, start=reply.seq + 1)
        ]
        return [call for call in calls if call.step is None or not call.step.state.is_answered]

    def add(self, steps: Sequence[Step], used: RunUsage) -> None:
        """Take over steps that have been recorded; a tool step replaces its intent."""
        by_seq = {step.seq: step for step in (*self.steps, *steps)}
        self.steps = [by_seq[seq] for seq in sorted(by_seq)]
        self.usage = total(self.usage, used)

    def time_left(self) -> float:
        """Seconds of running time until the deadline."""
        earlier = self.run.time.active_ms / 1000
        return self.run.limits.deadline_s - earlier - (time.monotonic() - self.started_at)

    def most_repeats(self) -> int:
        """How often the most repeated call was asked for: the same tool with the same arguments."""
        calls = Counter(
            (call.name, _comparable(call.arguments))
            for step in self.steps
            if isinstance(step, ModelStep)
            for call in step.tool_calls
        )
        return max(calls.values(), default=0)

    def failures_in_a_row(self) -> tuple[int, Step | None]:
        """How many of the last replies were of no use, and the last step that shows it.

        Of no use: a reply that had to be corrected, or whose calls were all malformed or all crashed.
        """
        count, shown_by = 0, None
        for reply, results in reversed(self._turns()):
            failed = _failure(reply, results)
            if failed is None:
                break
            count, shown_by = count + 1, shown_by or failed
        return count, shown_by

    def _turns(self) -> list[tuple[ModelStep, list[ToolStep]]]:
        turns: list[tuple[ModelStep, list[ToolStep]]] = []
        for step in self.steps:
            if isinstance(step, ModelStep):
                turns.append((step, []))
            else:
                turns[-1][1].append(step)
        return turns


def _failure(reply: ModelStep, results: Sequence[ToolStep]) -> Step | None:
    if reply.correction is not None:
        return reply
    if results and all(step.state in (ToolState.INVALID, ToolState.CRASHED) for step in results):
        return results[-1]
    return None


def _comparable(arguments: str) -> str:
    try:
        return json.dumps(_JSON.validate_json(arguments), sort_keys=True)
    except ValidationError:
        return arguments


def total(left: RunUsage, right: RunUsage) -> RunUsage:
    """Both together. The cost is unknown as soon as a part of it is."""
    return RunUsage(
        model_calls=left.model_calls + right.model_calls,
        input_tokens=left.input_tokens + right.input_tokens,
        cached_tokens=left.cached_tokens + right.cached_tokens,
        output_tokens=left.output_tokens + right.output_tokens,
        cost_usd=None if left.cost_usd is None or right.cost_usd is None else left.cost_usd + right.cost_usd,
    )
