"""What a route asks for: the services that the lifespan made, and the caller, who must have a scope."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request

from app.api.metrics import AuthenticationFailure, Metrics
from app.api.waiters import Waiters
from app.back_ends import TraceLinks
from app.config import Settings
from app.db import keys
from app.decisions import Decisions
from app.domain.errors import REALM, MissingScope, Unauthorized
from app.domain.principal import Principal, Scope
from app.gauges import StateGauges
from app.intake import Intake
from app.key_usage import KeyUsage
from app.logging import add
from app.rate_limit import RateLimiter
from app.registry import Registry
from app.signals import Signals

_BEARER = f'Bearer realm="{REALM}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Made once, at the start of the process."""

    settings: Settings
    engine: AsyncEngine
    signals: Signals
    waiters: Waiters
    agents: Registry
    intake: Intake
    decisions: Decisions
    rate_limiter: RateLimiter
    key_usage: KeyUsage
    trace_links: TraceLinks
    metrics: Metrics
    gauges: StateGauges
    newest_revision: str
    """The database's schema must be at least here."""


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]


class _ApiKey(SecurityBase):
    """The caller, by their API key: one dependency that is the OpenAPI scheme, too."""

    scheme_name = "apiKey"
    model = HTTPBearer(
        bearerFormat="ask_<id>_<secret>",
        description="An API key. Each operation names the scope that the key needs; `admin` includes all that are about"
        " the key's tenant.",
    )

    def __init__(self, *, or_else: Scope | None = None) -> None:
        self._or_else = or_else
        """A scope that will do as well."""

    async def __call__(self, request: Request, wanted: SecurityScopes) -> Principal:
        services: Services = request.app.state.services
        caller = await _authenticated(request, services)
        services.key_usage.note(caller.key_id)
        if not await services.rate_limiter.admit(caller):
            services.metrics.count_unchecked_rate()
        for scope in wanted.scopes:
            if not caller.has(Scope(scope)) and not (self._or_else and caller.has(self._or_else)):
                services.metrics.count_authentication_failure(AuthenticationFailure.MISSING_SCOPE)
                raise MissingScope(scope, f"the API key needs the scope {scope}")
        return caller


async def _authenticated(request: Request, services: Services) -> Principal:
    """Raises `Unauthorized`."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        services.metrics.count_authentication_failure(AuthenticationFailure.MISSING)
        raise Unauthorized("send Authorization: Bearer ask_…", headers={"WWW-Authenticate": _BEARER})
    caller, key = None, key.strip()
    if keys.is_well_formed(key):
        async with services.engine.connect() as connection:
            caller = await keys.authenticate(connection, key)
    if caller is None:
        services.metrics.count_authentication_failure(AuthenticationFailure.INVALID)
        raise Unauthorized(
            "this API key is unknown, expired or revoked",
            headers={"WWW-Authenticate": f'{_BEARER}, error="invalid_token"'},
        )
    add(tenant=caller.tenant)
    return caller


_api_key = _ApiKey()
_reviewers_key = _ApiKey(or_else=Scope.REVIEWS_ESCALATED)  # which of the two it takes, the review's queue says

RunReader = Annotated[Principal, Security(_api_key, scopes=[Scope.RUNS_READ.value])]
RunWriter = Annotated[Principal, Security(_api_key, scopes=[Scope.RUNS_WRITE.value])]
AuditReader = Annotated[Principal, Security(_api_key, scopes=[Scope.AUDIT_READ.value])]
Scaler = Annotated[Principal, Security(_api_key, scopes=[Scope.SCALING_READ.value])]
Admin = Annotated[Principal, Security(_api_key, scopes=[Scope.ADMIN.value])]
ReviewReader = Annotated[Principal, Security(_api_key, scopes=[Scope.REVIEWS_READ.value])]
Reviewer = Annotated[Principal, Security(_reviewers_key, scopes=[Scope.REVIEWS_DECIDE.value])]
