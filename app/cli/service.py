"""The service's processes, and what comes before them: `migrate`, `api`, `worker`."""

import os
import signal
import socket
import sys

import click

from app.cli.database import database_errors
from app.domain.errors import ConfigurationError


@click.command()
def migrate() -> None:
    """Bring the database's schema up to date, as its owner."""
    from app.config import DatabaseSettings, load_settings
    from app.db.migrate import admit, upgrade

    settings = load_settings(DatabaseSettings)
    with database_errors():
        upgrade(settings.owner_url)
        if settings.owner_database_url:
            admit(settings.owner_url, settings.database_user)
    click.echo("The database is up to date.", err=True)


@click.command()
def api() -> None:
    """Serve the HTTP API."""
    from app.startup import loading

    with loading():
        from app.config import load_settings
        from app.logging import configure_logging

        settings = load_settings()
        configure_logging(settings.log_level, secrets=settings.secrets, patterns=settings.redact_patterns)

        import uvicorn

        from app.api.protocol import ProblemProtocol, most_connections
        from app.main import create_app

        config = uvicorn.Config(
            create_app(settings),
            host=settings.api_host,
            port=settings.api_port,
            loop="uvloop",
            http=ProblemProtocol,
            ws="none",
            limit_concurrency=most_connections(),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,  # longer than clients and load balancers keep an idle connection: they close it
            timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
        )
        config.load()
    try:
        listener = socket.create_server(
            (settings.api_host, settings.api_port),
            family=socket.AF_INET6 if ":" in settings.api_host else socket.AF_INET,
            backlog=config.backlog,
        )
    except OSError as error:
        where = f"{settings.api_host}:{settings.api_port}"
        raise ConfigurationError(f"API_HOST, API_PORT: cannot listen on {where}: {error.strerror}") from error
    # uvicorn raises the signal again when it has served its last request: that is a good end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    uvicorn.Server(config).run(sockets=[listener])


@click.command()
def worker() -> None:
    """Execute runs."""
    # A SIGTERM that comes between the two waits until the worker can hear it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    # The API's side of the service must not import the worker's, so this process becomes one.
    os.execv(sys.executable, [sys.executable, "-m", "worker"])  # noqa: S606 - no shell, nothing from outside
