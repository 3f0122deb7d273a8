"""The command line: `agent-service`.

One file a group of commands: stack (`dev`, `demo`), service (`migrate`, `api`, `worker`), keys, budgets, reviews,
audit.

Exit codes: 0 done, 1 it did not work, 2 wrong usage or a wrong setting. Commands import what they need when they run.
"""

import signal
import sys

import click

from app import __version__
from app.cli.audit import audit
from app.cli.budgets import budgets
from app.cli.keys import keys
from app.cli.reviews import reviews
from app.cli.service import api, migrate, worker
from app.cli.stack import demo, dev
from app.domain.errors import ConfigurationError

__all__ = ["cli", "main"]


def main() -> None:
    """Entry point of `agent-service`."""
    # As the first process of a container it would not be ended by SIGTERM, if nobody said so.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        cli(prog_name="agent-service")
    except ConfigurationError as error:
        click.echo(f"agent-service: {error}", err=True)
        sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Run model-and-tool agents: an API that takes runs, workers that execute them."""


for command in (dev, demo, migrate, api, worker, keys, budgets, reviews, audit):
    cli.add_command(command)
