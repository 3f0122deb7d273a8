"""Runs: submit, read, wait, list, cancel; their steps and their audit."""

import asyncio
import time
from contextlib import suppress
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.api import schemas
from app.api.access import note_read
from app.api.body import JsonBody
from app.api.deps import AuditReader, RunReader, RunWriter, Services, ServicesDep
from app.api.openapi import json_body, problems
from app.api.pagination import PageById, PageBySeq, cut, id_cursor, seq_cursor
from app.db import audit, runs, steps
from app.domain.errors import NotFound
from app.domain.run import Priority, Run, RunStatus
from app.domain.trace_context import TraceContext
from app.intake import Submission
from app.logging import about_run

MAX_WAIT_SECONDS = 60
LOOK_AGAIN_SECONDS = 5.0
"""A waiting request looks into the database this often in case that the signal was lost."""

router = APIRouter(tags=["runs"])

RunId = Annotated[UUID, Path(description="The run's id.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[!-~]([ -~]*[!-~])?$",
        description="Yours, of printable ASCII: the same request sent again with it gives the same run.",
    ),
]


def _trace_context(
    request: Request,
    _: Annotated[
        str | None,
        Header(
            alias="traceparent",
            description="W3C Trace Context: the run's trace is linked to this span. Ignored where it is malformed.",
        ),
    ] = None,
) -> str | None:
    """The caller's span, as a header of version 00."""
    context = TraceContext.sent(request.headers.getlist("traceparent"))
    return str(context) if context else None


TraceParent = Annotated[str | None, Depends(_trace_context)]


class RunQuery(PageById):
    status: RunStatus | None = Field(None, description="Only runs in this state.")
    agent: str | None = Field(None, pattern="^[a-z][a-z0-9_-]{0,63}$", description="Only runs of this agent.")


class AuditQuery(PageBySeq):
    limit: int = Field(50, ge=2, le=100, description="Entries on a page, at most. Reading a page adds one itself.")


class WaitQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    wait: float = Field(
        0,
        ge=0,
        le=MAX_WAIT_SECONDS,
        description="Seconds to hold the answer until the run has ended or waits for a person.",
    )


@router.post(
    "/v1/runs",
    status_code=202,
    operation_id="submitRun",
    summary="Submit a run",
    response_description="Accepted: the run is stored and will end.",
    responses={
        202: {
            "headers": {
                "Location": {"description": "Where the run is.", "schema": {"type": "string"}},
                "Idempotent-Replayed": {
                    "description": "`true`: accepted before, under the same Idempotency-Key.",
                    "schema": {"type": "string", "enum": ["true"]},
                },
            }
        },
        **problems(413, 415, 422),
    },
    openapi_extra=json_body(schemas.SubmitRun),
)
async def submit_run(
    *,
    request: Request,
    response: Response,
    caller: RunWriter,
    services: ServicesDep,
    body: Annotated[schemas.SubmitRun, Depends(JsonBody(schemas.SubmitRun))],
    idempotency_key: IdempotencyKey = None,
    traceparent: TraceParent,
) -> schemas.Run:
    submission = Submission(
        agent=body.agent,
        input=body.input,
        limits=body.limits,
        metadata=body.metadata,
        priority=Priority[body.priority.upper()],
        idempotency_key=idempotency_key,
        request_id=request.state.request_id,
        traceparent=traceparent,
    )
    run, replayed = await services.intake.submit_run(caller, submission)
    about_run(run.id)
    response.headers["Location"] = f"/v1/runs/{run.id}"
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
        await note_read(request, services, caller, [run.id], "run")
    else:
        services.metrics.count_accepted(run.agent)
    return _shown(services, run)


@router.get("/v1/runs", operation_id="listRuns", summary="List runs, newest first", responses=problems(422))
async def list_runs(
    request: Request, caller: RunReader, services: ServicesDep, query: Annotated[RunQuery, Query()]
) -> schemas.RunList:
    where = runs.RunFilter(status=query.status, agent=query.agent, before=query.cursor)
    async with services.engine.connect() as connection:
        page, has_more = await runs.list_newest(connection, caller.tenant, where, limit=query.limit)
    await note_read(request, services, caller, [run.id for run in page], "runs")
    next_cursor = id_cursor(page[-1].id) if has_more else None
    return schemas.RunList(data=[_shown(services, run) for run in page], next_cursor=next_cursor)


@router.get(
    "/v1/runs/{run_id}", operation_id="getRun", summary="Read a run, or wait for it", responses=problems(404, 422)
)
async def get_run(
    request: Request,
    caller: RunReader,
    services: ServicesDep,
    run_id: RunId,
    query: Annotated[WaitQuery, Query()],
) -> schemas.Run:
    if query.wait:
        run = await _when_at_rest(request, services, run_id, caller.tenant, seconds=query.wait)
    else:
        run = await _find(services, run_id, caller.tenant)
    await note_read(request, services, caller, [run_id], "run")
    return _shown(services, run)


@router.get(
    "/v1/runs/{run_id}/steps",
    operation_id="listSteps",
    summary="List what a run did",
    responses=problems(404, 422),
)
async def list_steps(
    request: Request, caller: RunReader, services: ServicesDep, run_id: RunId, query: Annotated[PageBySeq, Query()]
) -> schemas.StepList:
    await _find(services, run_id, caller.tenant)
    after = -1 if query.cursor is None else query.cursor
    async with services.engine.connect() as connection:
        found = await steps.steps_of(connection, run_id, after=after, limit=query.limit + 1)
    await note_read(request, services, caller, [run_id], "steps")
    return schemas.StepList.of(*cut(found, query.limit, lambda step: seq_cursor(step.seq)))


@router.get(
    "/v1/runs/{run_id}/audit",
    operation_id="listAuditEvents",
    summary="List what was recorded about a run",
    responses=problems(404, 422),
)
async def list_audit_events(
    request: Request, caller: AuditReader, services: ServicesDep, run_id: RunId, query: Annotated[AuditQuery, Query()]
) -> schemas.AuditEventList:
    await _find(services, run_id, caller.tenant)
    async with services.engine.connect() as connection:
        found = await audit.events_of(connection, run_id, caller.tenant, after=query.cursor or 0, limit=query.limit + 1)
    page, next_cursor = cut(found, query.limit, lambda event: seq_cursor(event.seq))
    await note_read(request, services, caller, [run_id], "audit")
    return schemas.AuditEventList(data=[schemas.AuditEvent.of(event) for event in page], next_cursor=next_cursor)


@router.post(
    "/v1/runs/{run_id}/cancel",
    status_code=202,
    operation_id="cancelRun",
    summary="Cancel a run",
    response_description="Cancelled, now or before. A model call under way is abandoned.",
    responses=problems(404, 409),
)
async def cancel_run(request: Request, caller: RunWriter, services: ServicesDep, run_id: RunId) -> schemas.Run:
    run = await services.intake.cancel_run(caller, run_id)
    await note_read(request, services, caller, [run_id], "run")
    return _shown(services, run)


def _shown(services: Services, run: Run) -> schemas.Run:
    return schemas.Run.of(run, services.trace_links.of(run.id))


async def _find(services: Services, run_id: UUID, tenant: str) -> Run:
    async with services.engine.connect() as connection:
        run = await runs.get(connection, run_id, tenant)
    if run is None:
        raise NotFound("no such run")
    return run


async def _when_at_rest(request: Request, services: Services, run_id: UUID, tenant: str, *, seconds: float) -> Run:
    """The run as soon as it has ended or waits for a person, or as it is when the time is over."""
    clock = time.monotonic
    began = clock()
    until = began + seconds
    with services.waiters.waiting_for(run_id) as rested:
        while True:
            rested.clear()
            run = await _find(services, run_id, tenant)
            left = until - clock()
            if run.status.is_terminal or run.status is RunStatus.WAITING or left <= 0:
                return run
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, LOOK_AGAIN_SECONDS)):
                    await rested.wait()
            request.state.held_s = clock() - began
            if await request.is_disconnected():
                return run
