"""How many workers there should be: for whatever starts and stops them."""

from dataclasses import asdict

from fastapi import APIRouter

from app.api import schemas
from app.api.deps import Scaler, ServicesDep
from app.api.openapi import problems
from app.domain.errors import Unavailable
from app.domain.scaling import desired_workers
from app.gauges import FRESH_SECONDS

router = APIRouter(tags=["scaling"])


@router.get(
    "/v1/scaling",
    operation_id="getScaling",
    summary="How many workers should there be?",
    description="Of the whole service, at most a few seconds old. Where it cannot be known the answer is a 503, and no"
    " number: keep the workers that there are.",
    responses=problems(),
)
async def get_scaling(_: Scaler, services: ServicesDep) -> schemas.Scaling:
    load = await services.gauges.load()
    if load is None:
        headers = {"Retry-After": f"{FRESH_SECONDS:.0f}"}
        raise Unavailable("the database does not say how much there is to do; keep the workers", headers=headers)
    rules = services.settings.scaling
    return schemas.Scaling(desired_workers=desired_workers(load, rules), **asdict(load), **asdict(rules))
