"""Runs as a worker holds them: claim, record, suspend, requeue, finish.

Every write after the claim is one statement that applies only while the run is `running` under the claim's token;
zero rows mean that somebody else owns the run, or that it has ended: `LeaseLost`. The clock is Postgres'.
"""

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

from pydantic import JsonValue
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.elements import TextClause

from app.db.audit import audit_parameters
from app.db.fetch import Row, fetch, fetch_one
from app.db.runs import COLUMNS, run_of
from app.db.steps import step_parameters
from app.domain.agent import ReviewRules
from app.domain.audit import AuditEntry, AuditKind
from app.domain.build import Build
from app.domain.errors import LeaseLost
from app.domain.ids import new_id
from app.domain.review import ReviewRequest
from app.domain.run import Claim, Run, RunStatus, RunUsage, StopReason
from app.domain.step import ModelStep, Step, ToolStep

_HELD = "id = :id AND status = 'running' AND lease_token = :token"
_LET_GO = """
    lease_token = NULL, lease_until = NULL, running_since = NULL,
    active_ms = active_ms + extract(epoch FROM now() - running_since) * 1000
"""

_CLAIM = text(f"""
    WITH claimed AS (
        UPDATE runs
        SET status = 'running', attempt = attempt + 1, lease_token = :token,
            lease_until = now() + make_interval(secs => :lease_seconds), worker = :worker, image_digest = :image_digest,
            git_revision = :git_revision, running_since = now(), started_at = coalesce(started_at, now()),
            needs_enqueue = false
        WHERE id = :id AND status = 'queued'
        RETURNING {COLUMNS}
    )
    SELECT claimed.*,
           append_audit(id, tenant, :actor, jsonb_build_array(jsonb_build_object(
               'kind', CAST(:kind AS text), 'data', CAST(:data AS jsonb) || jsonb_build_object('attempt', attempt))))
    FROM claimed
""")  # noqa: S608 - the fragments in this module are constants


async def claim(
    connection: AsyncConnection, run_id: UUID, *, worker: str, lease_seconds: float, build: Build
) -> Claim | None:
    """queued → running, under a fresh token. None: there is nothing to claim (any more)."""
    token = uuid4()
    row = await fetch_one(
        connection,
        _CLAIM,
        {
            "id": run_id,
            "token": token,
            "lease_seconds": lease_seconds,
            "worker": worker,
            "image_digest": build.image_digest,
            "git_revision": build.git_revision,
            "actor": f"worker:{worker}",
            "kind": AuditKind.RUN_CLAIMED,
            "data": json.dumps({"image_digest": build.image_digest, "git_revision": build.git_revision}),
        },
    )
    return Claim(run=run_of(row), token=token) if row else None


_EXTEND = text("""
    WITH held AS (
        SELECT run_id AS id, token FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS uuid[])) AS held (run_id, token)
    ), ours AS (
        SELECT id FROM runs JOIN held USING (id) WHERE lease_token = held.token AND status = 'running'
    ), free AS (
        SELECT id FROM runs JOIN ours USING (id) FOR UPDATE OF runs SKIP LOCKED
    ), extended AS (
        UPDATE runs SET lease_until = now() + make_interval(secs => :lease_seconds)
        FROM free JOIN held USING (id)
        WHERE runs.id = free.id AND lease_token = held.token AND status = 'running'
        RETURNING runs.id
    )
    SELECT ours.id, extended.id IS NOT NULL AS is_extended FROM ours LEFT JOIN extended USING (id)
""")


async def extend(connection: AsyncConnection, held: dict[UUID, UUID], *, lease_seconds: float) -> dict[UUID, bool]:
    """Heartbeat of all runs of a process (run id → token) in one statement.

    Returns those that are still held, each with whether its lease was extended: a run whose row somebody has locked is
    left out this time, so that it does not hold up the others.
    """
    parameters = {"ids": list(held), "tokens": list(held.values()), "lease_seconds": lease_seconds}
    return {row["id"]: row["is_extended"] for row in await fetch(connection, _EXTEND, parameters)}


_IS_CANCELLED = text("SELECT status = 'cancelled' AS is_cancelled FROM runs WHERE id = :id")


async def is_cancelled(connection: AsyncConnection, run_id: UUID) -> bool:
    """Is that why it is not held any more?"""
    row = await fetch_one(connection, _IS_CANCELLED, {"id": run_id})
    return row is not None and row["is_cancelled"]


_RECORD = text(f"""
    WITH held AS (
        UPDATE runs
        SET model_calls = model_calls + :model_calls, input_tokens = input_tokens + :input_tokens,
            cached_tokens = cached_tokens + :cached_tokens, output_tokens = output_tokens + :output_tokens,
            cost_usd = cost_usd + CAST(:cost_usd AS numeric),
            model_ms = model_ms + :model_ms, tools_ms = tools_ms + :tools_ms,
            lease_until = now() + make_interval(secs => :lease_seconds)
        WHERE {_HELD}
        RETURNING id, tenant
    ), recorded AS (
        INSERT INTO steps (run_id, seq, kind, attempt, state, body)
        SELECT held.id, step.seq, step.kind, step.attempt, step.state, step.body
        FROM held,
             jsonb_to_recordset(CAST(:steps AS jsonb)) AS step (seq int, kind text, attempt int, state text, body jsonb)
        ON CONFLICT (run_id, seq) DO UPDATE
        SET attempt = excluded.attempt, state = excluded.state, body = excluded.body, recorded_at = now()
        WHERE steps.state IN ('intended', 'in_doubt')
    )
    SELECT append_audit(id, tenant, :actor, CAST(:events AS jsonb)) FROM held
""")  # noqa: S608

NOTHING_USED = RunUsage()


async def record(
    connection: AsyncConnection,
    claim: Claim,
    steps: Sequence[Step],
    *,
    lease_seconds: float,
    audit: Sequence[AuditEntry],
    actor: str,
    used: RunUsage = NOTHING_USED,
) -> None:
    """Add steps (a tool step replaces its intent), what they used and their audit, and extend the lease: one commit.

    Tool calls that are recorded together were made together: the longest of them is what they took. Raises `LeaseLost`.
    """
    await _write(
        connection,
        _RECORD,
        claim,
        {
            "model_calls": used.model_calls,
            "input_tokens": used.input_tokens,
            "cached_tokens": used.cached_tokens,
            "output_tokens": used.output_tokens,
            "cost_usd": used.cost_usd,
            "lease_seconds": lease_seconds,
            "model_ms": max((step.duration_ms for step in steps if isinstance(step, ModelStep)), default=0),
            "tools_ms": max((step.duration_ms for step in steps if isinstance(step, ToolStep)), default=0),
            "steps": step_parameters(steps),
            **audit_parameters(actor, *audit),
        },
    )


_SUSPEND = text(f"""
    WITH held AS (
        UPDATE runs SET status = 'waiting', {_LET_GO} WHERE {_HELD} RETURNING id, tenant, agent, api_key_id
    ), doubted AS (
        UPDATE steps SET state = 'in_doubt' FROM held WHERE run_id = held.id AND state = 'intended'
    ), asked AS (
        INSERT INTO reviews (id, tenant, run_id, agent, kind, seq, tool, arguments, args_hash, why, stop_reason, barred,
                             on_expiry, expires_s, status, expires_at)
        SELECT review.id, held.tenant, held.id, held.agent, review.kind, review.seq, review.tool, review.arguments,
               review.args_hash, review.why, review.stop_reason,
               CASE WHEN :four_eyes
                    THEN array_remove(ARRAY['key:' || held.api_key_id, review.editor], NULL) ELSE '{{}}' END,
               :on_expiry, :expires_s, 'pending', now() + make_interval(secs => :expires_s)
        FROM held, jsonb_to_recordset(CAST(:reviews AS jsonb))
             AS review (id uuid, kind text, seq int, tool text, arguments jsonb, args_hash text, why text,
                        stop_reason text, editor text)
    )
    SELECT append_audit(id, tenant, :actor, CAST(:events AS jsonb)) FROM held
""")  # noqa: S608


async def suspend(
    connection: AsyncConnection, claim: Claim, reviews: Sequence[ReviewRequest], *, actor: str, rules: ReviewRules
) -> None:
    """running → waiting, with the questions that have to be answered before it goes on.

    Raises `LeaseLost`.
    """
    rows = [{"id": str(new_id()), **_review_row(review)} for review in reviews]
    entries = [
        AuditEntry(
            AuditKind.REVIEW_REQUESTED,
            {name: row[name] for name in ("id", "kind", "seq", "tool", "stop_reason")},
            {"arguments": row["arguments"], "args_hash": row["args_hash"], "why": row["why"]},
        )
        for row in rows
    ]
    await _write(
        connection,
        _SUSPEND,
        claim,
        {
            "reviews": json.dumps(rows),
            "four_eyes": rules.four_eyes,
            "on_expiry": rules.on_expiry,
            "expires_s": rules.expires_s,
            **audit_parameters(actor, *entries, AuditEntry(AuditKind.RUN_SUSPENDED)),
        },
    )


def _review_row(review: ReviewRequest) -> dict[str, JsonValue]:
    return {name: getattr(review, name) for name in ReviewRequest.__dataclass_fields__}


_REQUEUE = text(f"""
    WITH held AS (
        UPDATE runs SET status = 'queued', queued_at = now(), needs_enqueue = true, {_LET_GO}
        WHERE {_HELD}
        RETURNING id, tenant
    )
    SELECT append_audit(id, tenant, :actor, CAST(:events AS jsonb)) FROM held
""")  # noqa: S608


async def requeue(connection: AsyncConnection, claim: Claim, *, actor: str, why: str) -> None:
    """running → queued: handed back, another worker goes on from the last recorded step.

    Marked for the sweeper, should this process end before it has told Redis. Raises `LeaseLost`.
    """
    entry = AuditEntry(AuditKind.RUN_REQUEUED, {"why": why})
    await _write(connection, _REQUEUE, claim, audit_parameters(actor, entry))


_FINISH = text(f"""
    WITH held AS (
        UPDATE runs
        SET status = :status, stop_reason = :stop_reason, output = CAST(:output AS jsonb), error = :error,
            ended_at = now(), {_LET_GO}
        WHERE {_HELD}
        RETURNING {COLUMNS}
    ), doubted AS (
        UPDATE steps SET state = 'in_doubt' FROM held WHERE run_id = held.id AND state = 'intended'
    )
    SELECT held.*, append_audit(id, tenant, :actor, CAST(:events AS jsonb)) FROM held
""")  # noqa: S608


async def finish(
    connection: AsyncConnection,
    claim: Claim,
    reason: StopReason,
    *,
    actor: str,
    output: JsonValue = None,
    error: str | None = None,
) -> Run:
    """running → the terminal state that goes with the reason. An intent without a result is `in_doubt` for ever.

    Returns the run as it ended. Raises `LeaseLost`.
    """
    left: dict[str, JsonValue] = {"output": output, "error": error}
    entry = AuditEntry(_END[reason.status], {"stop_reason": reason}, left)
    row = await _write(
        connection,
        _FINISH,
        claim,
        {
            "status": reason.status,
            "stop_reason": reason,
            "output": None if output is None else json.dumps(output),
            "error": error,
            **audit_parameters(actor, entry),
        },
    )
    return run_of(row)


_END = {
    RunStatus.SUCCEEDED: AuditKind.RUN_SUCCEEDED,
    RunStatus.FAILED: AuditKind.RUN_FAILED,
    RunStatus.CANCELLED: AuditKind.RUN_CANCELLED,
}


async def _write(connection: AsyncConnection, statement: TextClause, claim: Claim, parameters: dict[str, Any]) -> Row:
    row = await fetch_one(connection, statement, {"id": claim.run.id, "token": claim.token, **parameters})
    if row is None:
        raise LeaseLost(f"run {claim.run.id} is not held any more")
    return row
