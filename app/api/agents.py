"""Agents: what can be asked."""

from fastapi import APIRouter

from app.api import schemas
from app.api.deps import RunReader, ServicesDep
from app.api.openapi import problems

router = APIRouter(tags=["agents"])


@router.get("/v1/agents", operation_id="listAgents", summary="List agents", responses=problems())
async def list_agents(_: RunReader, services: ServicesDep) -> schemas.AgentList:
    return schemas.AgentList(data=[schemas.Agent.of(services.agents[name]) for name in sorted(services.agents)])
