"""The spans of a run: the one model that every back end is given.

    invoke_agent {agent}            the root: from its acceptance to its end
    ├── queued                      until a worker took it, each time
    ├── attempt lost                the time of a worker that died with it
    ├── chat {model}                each model call: also those that failed, and were made again
    ├── execute_tool {tool}         each tool call
    └── wait for person             each review

The trace's id is the run's id, and the root's id is the last half of it: whoever goes on with a run, in whatever
process, adds to the same trace without being told anything. Spans are made when they are over. So an attempt whose
worker dies leaves what it had done; and the root is made last, when the run has ended, by whoever finds out.

Times are Postgres' as far as it has them. A worker's own are moved by what its clock is off at the claim, so that
nothing in a trace begins before it could.
"""

import time
from calendar import timegm
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from uuid import UUID

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SynchronousMultiSpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from app import __version__
from app.config import Settings
from app.domain.agent import Agent, Capture
from app.domain.review import Review
from app.domain.run import Run, RunStatus
from app.domain.step import ToolStep
from app.redaction import Redaction
from worker import semconv
from worker.content import Content, Conversation
from worker.llm.base import ModelReply, ModelRequest
from worker.observer import CallKind
from worker.span_attributes import (
    FAILURES,
    UNKNOWN_TOOL,
    Attributes,
    of_every_span,
    of_reply,
    of_review,
    of_root,
    of_tool_call,
)
from worker.state import RunState

SERVICE = "agent-service"


class Tracer:
    """Makes the traces of this process, and gives their spans to the provider's processors. Only from the event loop.

    `worker`: this process' name. `redaction`: what nobody may show of content.
    """

    def __init__(self, settings: Settings, *, worker: str, redaction: Redaction) -> None:
        self._processors = SynchronousMultiSpanProcessor()  # type: ignore[no-untyped-call]
        self.provider = TracerProvider(
            resource=_resource(settings, worker),
            active_span_processor=self._processors,
            sampler=ALWAYS_ON,
            shutdown_on_exit=False,
        )
        self._scope = InstrumentationScope(SERVICE, __version__)
        self._ids = RandomIdGenerator()
        self._worker = worker
        self._redaction = redaction
        self.skip: Callable[[], bool] = lambda: False
        """Asked before a span is made: would nobody take it? Then it is not made, and has been counted as lost."""

    def trace(self, run: Run, agent: Agent | None) -> "RunTrace":
        """That of a run, as it stands. Of an agent that nobody knows any more no content is shown."""
        content = Content(agent.capture if agent else Capture.NONE, self._redaction)
        return RunTrace(self, run, content, self._worker)

    def make(
        self,
        name: str,
        run_id: UUID,
        began: int,
        ended: int,
        attributes: Attributes,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        error: tuple[str, str] | None = None,
        root_of: list[Link] | None = None,
    ) -> None:
        """A span below the root, or (`root_of`: with these links) the root. Times in nanoseconds since 1970.

        `error`: its type, and what is said of it.
        """
        root = _context(run_id.int, root_id(run_id))
        is_root = root_of is not None
        ended = max(began, ended)
        events = []
        if error is not None:
            # LangSmith knows an error only by its exception.
            said = {semconv.EXCEPTION_TYPE: error[0], semconv.EXCEPTION_MESSAGE: error[1]}
            events.append(Event(semconv.EXCEPTION, said, timestamp=ended))
        # Not by way of the provider's tracer: that is for spans under way, and takes a third longer.
        span = ReadableSpan(
            name,
            root if is_root else _context(run_id.int, self._ids.generate_span_id()),
            parent=None if is_root else root,
            resource=self.provider.resource,
            attributes={name: value for name, value in attributes.items() if value is not None},
            events=events,
            links=root_of or (),
            kind=kind,
            status=Status(StatusCode.ERROR, error[1]) if error else Status(),
            start_time=began,
            end_time=ended,
            instrumentation_scope=self._scope,
        )
        self._processors.on_end(span)


class RunTrace:
    """The trace of one run: what a worker that has it adds, and its end."""

    def __init__(self, tracer: Tracer, run: Run, content: Content, worker: str) -> None:
        self._tracer = tracer
        self._run = run
        self._content = content
        self._conversation = Conversation(content)
        self._attempt: Attributes = {semconv.ATTEMPT: run.attempt, semconv.WORKER: worker}
        self._ahead = time.time_ns() - _ns(run.running_since) if run.running_since else 0
        """Nanoseconds by which this clock is ahead of Postgres' (and the claim's way back)."""

    @cached_property
    def _common(self) -> Attributes:
        return of_every_span(self._run, self._content)

    def queued(self, until: datetime) -> None:
        """Its last time in the queue is over."""
        if self._tracer.skip():
            return
        attributes: Attributes = {semconv.KIND: "CHAIN", semconv.LANGSMITH_KIND: "chain"}
        self._add("queued", _ns(self._run.queued_at), _ns(until), {**attributes, semconv.ATTEMPT: self._run.attempt})

    def lost(self, since: datetime, until: datetime) -> None:
        """The worker that had it `since` then died, or was cut off, and `until` then nobody knew."""
        if self._tracer.skip():
            return
        attempt = self._run.attempt - (self._run.running_since is not None)
        attributes: Attributes = {
            semconv.KIND: "CHAIN",
            semconv.LANGSMITH_KIND: "chain",
            semconv.ATTEMPT: attempt,
            semconv.ERROR_TYPE: "lease_lost",
        }
        self._add(
            "attempt lost", _ns(since), _ns(until), attributes, error=("lease_lost", "Its worker did not end it.")
        )

    def reviewed(self, review: Review, until: datetime) -> None:
        """A person has decided; or, `until` then, the run went on or ended without."""
        if self._tracer.skip():
            return
        ended = _ns(review.decided_at or until)
        self._add("wait for person", _ns(review.created_at), ended, of_review(review, self._content))

    def model_called(
        self,
        request: ModelRequest,
        state: RunState,
        seconds: float,
        answer: ModelReply | BaseException,
        *,
        number: int,
        kind: CallKind,
    ) -> None:
        """One call of a model that has just come back, or failed, or was broken off. `number`: of this step, from 1."""
        if self._tracer.skip():
            return
        attributes: Attributes = {
            semconv.KIND: "LLM",
            semconv.OPERATION: "chat",
            semconv.PROVIDER: semconv.OPENAI,
            semconv.REQUEST_MODEL: request.model,
            semconv.REQUEST_MAX_TOKENS: request.max_output_tokens,
            semconv.LANGSMITH_PROVIDER: semconv.OPENAI,
            semconv.LANGSMITH_MODEL: request.model,
            semconv.STEP: state.next_seq,
            semconv.TRY: number,
            semconv.RETRIED: kind == "retry",
            semconv.IS_FALLBACK: kind == "fallback",
            semconv.INSTRUCTIONS: self._conversation.instructions(request.messages),
            semconv.INPUT_MESSAGES: self._conversation.shown(request.messages),
            **self._attempt,
        }
        error = None
        if isinstance(answer, ModelReply):
            price = state.prices.get(request.model)
            cost = float(price.of(answer.usage)) if price else None
            attributes = {**attributes, **of_reply(answer, cost, self._content)}
        else:
            error = type(answer).__name__, self._content.text(str(answer)) or type(answer).__name__
            attributes = {**attributes, semconv.ERROR_TYPE: error[0]}
        began, ended = self._since(seconds)
        self._add(f"chat {request.model}", began, ended, attributes, kind=SpanKind.CLIENT, error=error)

    def tool_called(self, step: ToolStep, seconds: float, *, is_known: bool) -> None:
        """One call that has just come back, or was broken off. `is_known`: the agent has such a tool."""
        if self._tracer.skip():
            return
        name = step.tool if is_known else self._content.text(step.tool) or UNKNOWN_TOOL
        attributes = of_tool_call(step, name, is_known=is_known, content=self._content)
        error = None
        if step.state in FAILURES:
            error = step.state.value, self._content.text(step.result) or step.state.value
        began, ended = self._since(seconds)
        self._add(f"execute_tool {name}", began, ended, {**attributes, **self._attempt}, error=error)

    def ended(self) -> None:
        """The run has: its root."""
        if self._tracer.skip():
            return
        run, content = self._run, self._content
        assert run.ended_at is not None
        error = None
        if run.status is RunStatus.FAILED and run.stop_reason:
            error = run.stop_reason.value, content.text(run.error) or run.stop_reason.value
        attributes = {**self._common, **of_root(run, content)}
        began, ended = _ns(run.created_at), _ns(run.ended_at)
        self._tracer.make(
            f"invoke_agent {run.agent}", run.id, began, ended, attributes, error=error, root_of=_links(run)
        )

    def _add(
        self,
        name: str,
        began: int,
        ended: int,
        attributes: Attributes,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        error: tuple[str, str] | None = None,
    ) -> None:
        self._tracer.make(name, self._run.id, began, ended, {**self._common, **attributes}, kind=kind, error=error)

    def _since(self, seconds: float) -> tuple[int, int]:
        ended = time.time_ns() - self._ahead
        return ended - int(seconds * 1e9), ended


def root_id(run_id: UUID) -> int:
    """The id of a run's root span. Never 0: a UUID's variant stands in these bits."""
    return run_id.int & 0xFFFF_FFFF_FFFF_FFFF


def _resource(settings: Settings, worker: str) -> Resource:
    return Resource.create(
        {
            semconv.SERVICE_NAME: SERVICE,
            semconv.SERVICE_VERSION: __version__,
            semconv.SERVICE_INSTANCE: worker,
            semconv.ENVIRONMENT: settings.environment,
            semconv.IMAGE_DIGEST: settings.image_digest,
            semconv.GIT_REVISION: settings.git_revision,
            semconv.PHOENIX_PROJECT: SERVICE,
            semconv.LANGFUSE_ENVIRONMENT: settings.environment,
            semconv.LANGFUSE_RELEASE: settings.image_digest or __version__,
            semconv.DATADOG_ENABLED: True,
        }
    )


def _links(run: Run) -> list[Link]:
    """The caller's own trace (W3C Trace Context)."""
    if run.traceparent is None:
        return []
    _, trace_id, span_id, flags = run.traceparent.split("-")[:4]
    caller = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    return [Link(caller)]


def _context(trace_id: int, span_id: int) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _ns(moment: datetime) -> int:
    """Nanoseconds since 1970. Not by way of a float, which has not enough digits."""
    return timegm(moment.utctimetuple()) * 1_000_000_000 + moment.microsecond * 1_000
