"""How a command says that it did not work: one line, exit code 1."""

import sys
from typing import NoReturn

import click


def fail(message: str) -> NoReturn:
    click.echo(f"agent-service: {message}", err=True)
    sys.exit(1)
