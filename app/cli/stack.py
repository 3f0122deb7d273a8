"""The development stack: `dev`, `demo`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from app.cli.failure import fail


@click.command()
def dev() -> None:
    """The whole stack on this machine until Ctrl-C, with auto-reload; its data is kept in .dev/."""
    from app.devstack.dev import dev

    with _stack_errors():
        dev()


@click.command()
def demo() -> None:
    """One run from beginning to end on a stack of its own, step by step; then stop everything."""
    from app.devstack.demo import demo

    with _stack_errors():
        succeeded = demo()
    sys.exit(not succeeded)


@contextmanager
def _stack_errors() -> Iterator[None]:
    """A part that did not start or broke down is told with the end of its output, not with a traceback of ours."""
    from app.devstack.processes import ProcessFailed

    try:
        yield
    except ProcessFailed as error:
        fail(str(error))
