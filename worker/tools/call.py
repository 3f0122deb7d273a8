"""Making tool calls: all of a reply at once, plain functions in a bounded thread pool, each within its timeout."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic_core import to_jsonable_python

from app.domain.canonical import storable, storable_text
from app.domain.errors import LeaseLost, ToolError
from app.domain.step import ToolState, ToolStep
from app.domain.tool import Database, Effect, Http, Tool, ToolContext
from worker.lease import WhileSure
from worker.state import RunState
from worker.tools.plan import PlannedCall

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ToolCaller:
    """Makes planned calls. `threads` bounds how many plain functions run at a time in this process.

    `sure_for`: for how many seconds the run is certainly still held here. What is not `READ` is called, and goes on,
    only while it is: a worker that was frozen, or cut off from Postgres, after it wrote down the intent must not act on
    it when somebody else has dealt with it.
    """

    db: Database
    http: Http
    threads: Executor
    sure_for: Callable[[], float] = lambda: 0.0
    called: Callable[[ToolStep, float], None] = lambda _step, _seconds: None

    def under(self, sure_for: Callable[[], float], called: Callable[[ToolStep, float], None]) -> "ToolCaller":
        """The same, for a run that is held for so long. `called`: told of each call, and how many seconds it took."""
        return replace(self, sure_for=sure_for, called=called)

    async def make(self, state: RunState, calls: Sequence[PlannedCall], results: list[ToolStep]) -> None:
        """Make the calls; each result is added as it comes, so that an interruption loses none that is known.

        Raises `LeaseLost`.
        """
        for step in results:  # answered without a call
            self.called(step, 0.0)
        try:
            async with asyncio.TaskGroup() as group:
                for call in calls:
                    group.create_task(self._make_one(state, call, results))
        except ExceptionGroup as lost:  # nothing else comes out of a call
            raise lost.exceptions[0] from None

    async def _make_one(self, state: RunState, call: PlannedCall, results: list[ToolStep]) -> None:
        began = time.monotonic()
        step = call.step
        try:
            tool_state, result = await self._outcome(state, call)
            known = {"state": tool_state, "result": result, "duration_ms": round((time.monotonic() - began) * 1000)}
            step = call.step.model_copy(update=known)
            results.append(step)
        finally:
            self.called(step, time.monotonic() - began)

    async def _outcome(self, state: RunState, call: PlannedCall) -> tuple[ToolState, str | None]:
        tool = call.tool
        try:
            async with asyncio.timeout(tool.timeout_s):
                return ToolState.SUCCEEDED, _as_text(await self._invoke(state, call), tool)
        except LeaseLost:
            raise
        except ToolError as error:
            return ToolState.FAILED, _cut(storable_text(str(error)), tool) or "The tool did not work."
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            # A tool is somebody else's code: whatever it raises is its failure, not the run's, or the worker's.
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # this one came from us
            logger.exception("tool crashed", extra={"fields": {"tool": tool.name}})
            if tool.effect is Effect.ONCE:
                return ToolState.IN_DOUBT, None
            slow = isinstance(error, TimeoutError)
            return ToolState.CRASHED, f"The tool {'took too long' if slow else 'failed unexpectedly'}."

    async def _invoke(self, state: RunState, call: PlannedCall) -> object:
        tool = call.tool
        arguments = {name: getattr(call.arguments, name) for name in type(call.arguments).model_fields}
        if tool.context_parameter is not None:
            arguments[tool.context_parameter] = ToolContext(
                run_id=state.run.id,
                tenant=state.run.tenant,
                attempt=state.run.attempt,
                deadline=datetime.now(UTC) + timedelta(seconds=state.time_left()),
                idempotency_key=call.step.idempotency_key,
                db=self.db,
                http=self.http,
            )
        with nullcontext() if tool.effect is Effect.READ else WhileSure(self.sure_for):
            if tool.is_async:
                return await tool.function(**arguments)
            return await asyncio.get_running_loop().run_in_executor(self.threads, self._in_thread, tool, arguments)

    def _in_thread(self, tool: Tool, arguments: dict[str, Any]) -> object:
        if tool.effect is not Effect.READ and self.sure_for() <= 0:  # it may have waited for a thread
            raise LeaseLost(f"not called: {tool.name}")
        return tool.function(**arguments)


def _as_text(value: object, tool: Tool) -> str:
    """A tool's return value as the model reads it: text as it is, everything else as JSON."""
    if isinstance(value, str):
        text = storable_text(value)
    else:
        plain = storable(to_jsonable_python(value, serialize_unknown=True, bytes_mode="base64"))
        text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"))
    return _cut(text, tool)


def _cut(text: str, tool: Tool) -> str:
    if len(text) <= tool.max_result_chars:
        return text
    return f"{text[: tool.max_result_chars]}\n[cut: {len(text)} characters in all]"
