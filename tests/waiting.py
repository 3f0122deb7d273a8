"""Runs that wait for people, brought there by the service's own transitions: no worker and no model is needed."""

import asyncio
from collections.abc import Sequence
from decimal import Decimal
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db import leases, runs
from app.db.engine import make_engine
from app.db.runs import Allowance
from app.domain.agent import Limits, OnExpiry, ReviewRules
from app.domain.build import Build
from app.domain.canonical import digest
from app.domain.ids import new_id
from app.domain.review import ReviewKind, ReviewRequest
from app.domain.run import NewRun, Priority, StopReason
from app.domain.step import Step

LIMITS = Limits(max_steps=4)
AMPLE = Allowance(max_in_flight=1_000_000, first_call_usd=Decimal(0))
"""Room for any run."""


def request(
    kind: ReviewKind = ReviewKind.APPROVAL,
    *,
    tool: str | None = "pay",
    arguments: JsonValue = None,
    seq: int | None = 1,
    stop_reason: StopReason | None = None,
    editor: str | None = None,
) -> ReviewRequest:
    """What a worker asks about a call."""
    seen: JsonValue = {"amount": 60} if arguments is None else arguments
    return ReviewRequest(
        kind=kind,
        seq=seq,
        tool=tool,
        arguments=seen,
        args_hash=digest({"tool": tool, "arguments": seen}),
        why="because",
        stop_reason=stop_reason,
        editor=editor,
    )


def limit_request(arguments: JsonValue = None, reason: StopReason = StopReason.MAX_STEPS) -> ReviewRequest:
    """What a worker asks about a run that has reached `LIMITS`."""
    proposed: JsonValue = {"max_steps": 8} if arguments is None else arguments
    return request(ReviewKind.LIMIT, tool=None, seq=None, arguments=proposed, stop_reason=reason)


def rules(*, expires_s: float = 3600, on_expiry: OnExpiry = OnExpiry.END, four_eyes: bool = False) -> ReviewRules:
    return ReviewRules(expires_s=expires_s, on_expiry=on_expiry, four_eyes=four_eyes)


async def wait_for(
    db: AsyncConnection,
    *requests: ReviewRequest,
    its: ReviewRules | None = None,
    tenant: str = "t",
    agent: str = "toolbox",
    run_input: JsonValue = "script:unknown",
    steps: Sequence[Step] = (),
    submitter: str = "submitter",
) -> UUID:
    """A run that waits for the answers."""
    new = NewRun(
        id=new_id(),
        tenant=tenant,
        api_key_id=submitter,
        agent=agent,
        agent_version="1",
        input=run_input,
        metadata={},
        limits=LIMITS,
        priority=Priority.NORMAL,
        idempotency_key=None,
        request_hash=b"",
        request_id="r",
    )
    await runs.accept(db, new, AMPLE)
    claim = await leases.claim(db, new.id, worker="w", lease_seconds=60, build=Build())
    assert claim is not None
    if steps:
        await leases.record(db, claim, steps, lease_seconds=60, audit=[], actor="worker:w")
    await leases.suspend(db, claim, requests or [request()], actor="worker:w", rules=its or rules())
    return new.id


def put_to_wait(database_url: str, *requests: ReviewRequest, **more: object) -> UUID:
    """`wait_for`, from where there is no event loop."""

    async def put() -> UUID:
        engine = make_engine(database_url, pool_size=1, application_name="test")
        try:
            async with engine.connect() as connection:
                return await wait_for(connection, *requests, **more)  # type: ignore[arg-type]
        finally:
            await engine.dispose()

    return asyncio.run(put())
