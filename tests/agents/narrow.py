"""Agents that may do little: read the pages of one host, and call what they list."""

import os

from app.domain.agent import Agent
from app.domain.web import http_get
from tests.agents import echo, open_the_door, rest, who_am_i

PAGES_PORT = os.environ.get("TESTS_PAGES_PORT", "1")
"""Where a test of this worker has its pages; nothing listens on port 1."""
DROPPED = os.environ.get("TESTS_DROPPED_TOOL")
"""A tool that the release of this worker does not have."""

reader = Agent(
    name="reader", instructions="Read.", tools=(http_get(f"127.0.0.1:{PAGES_PORT}", "docs.example.com", timeout_s=2),)
)

narrow = Agent(
    name="narrow",
    instructions="Do little.",
    tools=tuple(tool for tool in (echo, rest, open_the_door, who_am_i) if tool.name != DROPPED),
)
