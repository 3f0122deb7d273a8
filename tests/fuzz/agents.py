"""A few of the tests' agents: with all of them, most of the time would go into submitting to each."""

from tests.agents import typed
from tests.agents.people import clerk

__all__ = ["clerk", "typed"]
