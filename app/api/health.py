"""Probes, what is running, and what was counted. No key is needed, so nothing here tells a secret."""

import asyncio
from typing import Literal

from fastapi import APIRouter
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import PlainTextResponse, Response

from app import __version__
from app.api import schemas
from app.api.deps import Services, ServicesDep
from app.api.openapi import problems_without_key
from app.background import within
from app.db.schema import current_revision
from app.domain.errors import Unavailable
from app.metrics import CONTENT_TYPE

_PATIENCE_SECONDS = 2.0
"""A part that takes longer to answer counts as away."""

router = APIRouter(tags=["health"])


@router.get("/health/live", operation_id="live", summary="Is the process alive?", responses=problems_without_key())
async def live() -> schemas.Live:
    return schemas.Live()


@router.get(
    "/health/ready",
    operation_id="ready",
    summary="Can requests be served?",
    description="Needs Postgres, migrated at least as far as this release knows. Runs are accepted without Redis.",
    responses=problems_without_key(503),
)
async def ready(services: ServicesDep) -> schemas.Health:
    health = await _look(services)
    if health.status == "unavailable":
        why = ", ".join(f"{name} is {part.status}" for name, part in health.parts.items() if part.status != "ok")
        raise Unavailable(why, headers={"Retry-After": "1"})
    return health


@router.get(
    "/health",
    operation_id="health",
    summary="How are the parts?",
    description="For people and dashboards: always 200. Probes ask /health/live and /health/ready.",
    responses=problems_without_key(),
)
async def health(services: ServicesDep) -> schemas.Health:
    return await _look(services)


@router.get("/version", operation_id="version", summary="What is running?", responses=problems_without_key())
async def version(services: ServicesDep) -> schemas.Version:
    build = services.settings.build
    return schemas.Version(
        version=__version__,
        image_digest=build.image_digest,
        git_revision=build.git_revision,
        environment=build.environment,
    )


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="What was counted",
    description="In Prometheus' text format: counters of this process, and gauges of the whole service.",
    response_class=PlainTextResponse,
    responses=problems_without_key(),
)
async def metrics(services: ServicesDep) -> Response:
    await services.gauges.refresh()
    return Response(await services.metrics.text(), media_type=CONTENT_TYPE)


async def _look(services: Services) -> schemas.Health:
    (postgres, schema), redis = await asyncio.gather(_postgres_and_schema(services), _redis(services))
    status: Literal["ok", "degraded", "unavailable"] = "ok"
    if redis.status != "ok":
        status = "degraded"
    if postgres.status != "ok" or schema.status != "ok":
        status = "unavailable"
    return schemas.Health(status=status, parts={"postgres": postgres, "schema": schema, "redis": redis})


async def _postgres_and_schema(services: Services) -> tuple[schemas.Part, schemas.Part]:
    async def ask() -> str | None:
        async with services.engine.connect() as connection:
            return await current_revision(connection)

    try:
        revision = await within(_PATIENCE_SECONDS, ask())
    except (SQLAlchemyError, TimeoutError):
        return schemas.Part(status="away"), schemas.Part(status="away")
    known = services.newest_revision
    # A later revision is fine: every migration works with the release before it.
    behind = revision is None or revision < known
    detail = f"at {revision}, this release needs {known}" if behind else f"at {revision}"
    return schemas.Part(status="ok"), schemas.Part(status="behind" if behind else "ok", detail=detail)


async def _redis(services: Services) -> schemas.Part:
    try:
        reachable = await within(_PATIENCE_SECONDS, services.signals.is_reachable())
    except TimeoutError:
        reachable = False
    return schemas.Part(status="ok") if reachable else schemas.Part(status="away", detail="runs start late")
