"""A claimed run's record: every step in Postgres with its audit, under the run's lease."""

from collections.abc import Container, Sequence

from pydantic import JsonValue
from sqlalchemy.ext.asyncio import AsyncEngine

from app.db import leases
from app.domain.audit import AuditEntry, AuditKind
from app.domain.run import RunUsage
from app.domain.step import ModelStep, Step, ToolState, ToolStep
from worker.lease import Held, local_now


class RunJournal:
    """Records the steps of one claim.

    `versions` go into the audit of every model decision. `instructions_sha256`: of instructions that were made from the
    run's input, so it goes with what can be erased. So do names that are not among `tools`: models make up some.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        held: Held,
        *,
        lease_seconds: float,
        actor: str,
        versions: dict[str, JsonValue],
        tools: Container[str],
        instructions_sha256: str | None,
    ) -> None:
        self._engine = engine
        self._held = held
        self._lease_seconds = lease_seconds
        self._actor = actor
        self._versions = versions
        self._tools = tools
        self._instructions_sha256 = instructions_sha256

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
            said: dict[str, JsonValue] = {
                "content": step.content,
                "tool_calls": [{"tool": call.name, "arguments": call.arguments} for call in step.tool_calls],
            }
            if self._instructions_sha256:
                said["instructions_sha256"] = self._instructions_sha256
            asked: list[JsonValue] = [self._known(call.name) for call in step.tool_calls]
            data = {**_model_decision(step), "tools": asked, **self._versions}
            return AuditEntry(AuditKind.MODEL_REPLIED, data, said)
        intended = step.state is ToolState.INTENDED
        payload: dict[str, JsonValue] = {"tool": step.tool, "arguments": step.arguments}
        if not intended:
            payload["result"] = step.result
            if step.note is not None:
                payload["note"] = step.note
        kind = AuditKind.TOOL_INTENDED if intended else AuditKind.TOOL_ANSWERED
        return AuditEntry(kind, {**_tool_call(step), "tool": self._known(step.tool)}, payload)

    def _known(self, tool: str) -> str | None:
        return tool if tool in self._tools else None


def _model_decision(step: ModelStep) -> dict[str, JsonValue]:
    return {
        "step": step.seq,
        "model": step.model,
        "finish_reason": step.finish_reason,
        "input_tokens": step.usage.input_tokens,
        "output_tokens": step.usage.output_tokens,
        "cost_usd": None if step.cost_usd is None else str(step.cost_usd),
    }


def _tool_call(step: ToolStep) -> dict[str, JsonValue]:
    return {
        "step": step.seq,
        "effect": step.effect,
        "state": step.state,
        "idempotency_key": step.idempotency_key,
    }
