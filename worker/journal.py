"""A claimed run's record: every step in Postgres with its audit, under the run's lease."""

from collections.abc import Sequence

from pydantic import JsonValue
from sqlalchemy.ext.asyncio import AsyncEngine

from app.db import leases
from app.domain.audit import AuditEntry, AuditKind
from app.domain.canonical import digest
from app.domain.run import RunUsage
from app.domain.step import ModelStep, Step, ToolState, ToolStep
from worker.lease import Held, local_now


class RunJournal:
    """Records the steps of one claim. `versions` go into the audit of every model decision."""

    def __init__(
        self, engine: AsyncEngine, held: Held, *, lease_seconds: float, actor: str, versions: dict[str, JsonValue]
    ) -> None:
        self._engine = engine
        self._held = held
        self._lease_seconds = lease_seconds
        self._actor = actor
        self._versions = versions

    async def record(self, steps: Sequence[Step], used: RunUsage) -> None:
        """One commit. Raises `LeaseLost`."""
        audit = [self._audit_of(step) for step in steps]
        began = local_now()
        async with self._engine.connect() as connection:
            await leases.record(
                connection,
                self._held.claim,
                steps,
                lease_seconds=self._lease_seconds,
                audit=audit,
                actor=self._actor,
                used=used,
            )
        self._held.sure_until = began + self._lease_seconds

    def _audit_of(self, step: Step) -> AuditEntry:
        if isinstance(step, ModelStep):
            return AuditEntry(AuditKind.MODEL_REPLIED, {**_model_decision(step), **self._versions})
        intended = step.state is ToolState.INTENDED
        return AuditEntry(AuditKind.TOOL_INTENDED if intended else AuditKind.TOOL_ANSWERED, _tool_call(step))


def _model_decision(step: ModelStep) -> dict[str, JsonValue]:
    return {
        "step": step.seq,
        "model": step.model,
        "content_sha256": digest(step.content),
        "tool_calls": [{"tool": call.name, "arguments_sha256": digest(call.arguments)} for call in step.tool_calls],
        "finish_reason": step.finish_reason,
        "input_tokens": step.usage.input_tokens,
        "output_tokens": step.usage.output_tokens,
        "cost_usd": None if step.cost_usd is None else str(step.cost_usd),
    }


def _tool_call(step: ToolStep) -> dict[str, JsonValue]:
    return {
        "step": step.seq,
        "tool": step.tool,
        "effect": step.effect,
        "state": step.state,
        "idempotency_key": step.idempotency_key,
        "arguments_sha256": digest(step.arguments),
        "result_sha256": None if step.result is None else digest(step.result),
    }
