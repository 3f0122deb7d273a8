"""What a route asks for: the services that the lifespan made, and the caller, who must have a scope."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request

from app.api.waiters import Waiters
from app.config import Settings
from app.db import keys
from app.domain.errors import MissingScope, Unauthorized
from app.domain.principal import Principal, Scope
from app.intake import Intake
from app.registry import Registry
from app.signals import Signals

_REALM = 'Bearer realm="agent-service"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Made once, at the start of the process."""

    settings: Settings
    engine: AsyncEngine
    signals: Signals
    waiters: Waiters
    agents: Registry
    intake: Intake
    newest_revision: str
    """The database's schema must be at least here."""


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]

_bearer = HTTPBearer(
    scheme_name="apiKey",
    bearerFormat="ask_<id>_<secret>",
    description="An API key. Each operation names the scope that the key needs; `admin` includes all.",
    auto_error=False,
)


async def _authenticate(
    request: Request,
    wanted: SecurityScopes,
    services: ServicesDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    if credentials is None:
        raise Unauthorized("send Authorization: Bearer ask_…", headers={"WWW-Authenticate": _REALM})
    caller = await _find_caller(services.engine, credentials.credentials)
    if caller is None:
        raise Unauthorized(
            "this API key is unknown, expired or revoked",
            headers={"WWW-Authenticate": f'{_REALM}, error="invalid_token"'},
        )
    request.state.tenant = caller.tenant
    for scope in wanted.scopes:
        if not caller.has(Scope(scope)):
            raise MissingScope(
                f"the API key needs the scope {scope}",
                headers={"WWW-Authenticate": f'{_REALM}, error="insufficient_scope", scope="{scope}"'},
            )
    return caller


async def _find_caller(engine: AsyncEngine, key: str) -> Principal | None:
    try:
        async with engine.connect() as connection:
            return await keys.authenticate(connection, key)
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
    # Postgres had closed the connection, and the pool has now dropped all that are as old: a new one will do.
    async with engine.connect() as connection:
        return await keys.authenticate(connection, key)


RunReader = Annotated[Principal, Security(_authenticate, scopes=[Scope.RUNS_READ.value])]
RunWriter = Annotated[Principal, Security(_authenticate, scopes=[Scope.RUNS_WRITE.value])]
AuditReader = Annotated[Principal, Security(_authenticate, scopes=[Scope.AUDIT_READ.value])]
ReviewReader = Annotated[Principal, Security(_authenticate, scopes=[Scope.REVIEWS_READ.value])]
Reviewer = Annotated[Principal, Security(_authenticate, scopes=[Scope.REVIEWS_DECIDE.value])]
