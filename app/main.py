"""The API process: `create_app` puts it together, its lifespan makes what needs a running loop."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware import Middleware

from app import __version__
from app.api import agents, errors, health, reviews, runs, scaling, webhooks
from app.api.deps import Services
from app.api.metrics import Metrics
from app.api.middleware import BodyLimit, RequestContext
from app.api.openapi import describe
from app.api.waiters import Waiters
from app.back_ends import TraceLinks
from app.background import in_background
from app.config import Settings
from app.db.engine import make_engine
from app.db.schema import newest_revision
from app.decisions import Decisions
from app.enqueuer import Enqueuer
from app.gauges import StateGauges
from app.intake import Intake
from app.key_usage import KeyUsage
from app.metrics import EventLoopLag, make_registry
from app.prices import load_prices
from app.queue import RunQueue
from app.rate_limit import RateLimiter
from app.registry import Registry, load_agents
from app.signals import RESTED, Signals

POOL_SIZE = 10
"""Connections to Postgres. A request holds one for a statement or two; one that waits for a run holds none."""

_DESCRIPTION = """\
Submit a task for an agent, then poll for its result; `wait` holds the poll until there is one.

Errors are [RFC 9457](https://www.rfc-editor.org/rfc/rfc9457) problems: compare `type`, show `detail`.
"""
_TAGS = [
    {"name": "runs", "description": "Tasks and what became of them."},
    {"name": "reviews", "description": "What people have to decide."},
    {"name": "webhooks", "description": "Who is told of runs, and what was sent."},
    {"name": "agents", "description": "What can be asked."},
    {"name": "scaling", "description": "How many workers there should be."},
    {"name": "health", "description": "Probes, and what is running. No key needed."},
]


class Api(FastAPI):
    """FastAPI with our document, made once."""

    agents: Registry

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = describe(self, self.agents)
        return self.openapi_schema


def create_app(settings: Settings) -> FastAPI:
    """The API. Connects to nothing yet.

    Raises `ConfigurationError` where an agent cannot be loaded.
    """
    registry = load_agents(settings.agents)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with _services(settings, registry) as services:
            app.state.services = services
            yield {"metrics": services.metrics}  # in the state of every request, also of one that nobody routes

    app = Api(
        title="Agent Service",
        version=__version__,
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        lifespan=lifespan,
        middleware=[Middleware(RequestContext), Middleware(BodyLimit)],
        docs_url=None,  # both load their scripts from a content delivery network
        redoc_url=None,
        redirect_slashes=False,
    )
    app.agents = registry
    errors.install(app)
    for resource in (runs, reviews, webhooks, agents, scaling, health):
        app.include_router(resource.router)
    return app


@asynccontextmanager
async def _services(settings: Settings, registry: Registry) -> AsyncIterator[Services]:
    engine = make_engine(
        settings.database_url.get_secret_value(),
        pool_size=POOL_SIZE,
        application_name="agent-service-api",
    )
    redis_url = settings.redis_url.get_secret_value()
    queue, signals, waiters = RunQueue(redis_url), Signals(redis_url), Waiters()
    rate_limiter, key_usage = RateLimiter(redis_url), KeyUsage(engine)
    enqueuer = Enqueuer(queue, engine)
    series = make_registry(settings.build)
    intake = Intake(
        engine=engine,
        enqueuer=enqueuer,
        signals=signals,
        agents=registry,
        prices=load_prices(),
        model=settings.model,
    )
    try:
        async with (
            signals.listening(RESTED, waiters.wake),
            enqueuer.running(),
            key_usage.running(),
            in_background(EventLoopLag(series).keep_measuring()),
        ):
            yield Services(
                settings=settings,
                engine=engine,
                signals=signals,
                waiters=waiters,
                agents=registry,
                intake=intake,
                decisions=Decisions(engine=engine, enqueuer=enqueuer, signals=signals, agents=registry),
                rate_limiter=rate_limiter,
                key_usage=key_usage,
                trace_links=TraceLinks(settings),
                metrics=Metrics(series, registry),
                gauges=StateGauges(series, engine, registry, settings.scaling),
                newest_revision=newest_revision(),
            )
    finally:
        queue.close()
        await rate_limiter.aclose()
        await signals.aclose()
        await engine.dispose()
