"""The stack that the tests run against: the real servers, the API and a worker as processes, the stand-in model."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from app.config import Settings
from app.devstack import stack
from app.devstack.processes import Process, Reaper

TEMPLATE = "migrated"
"""A migrated database without data; tests that need one of their own get a copy."""


def clean_env(**variables: str) -> dict[str, str]:
    """Our environment without any setting of the service, and with these."""
    ours = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    return {**ours, "SECRETS_DIR": os.devnull, **variables}


@contextmanager
def new_directory() -> Iterator[Path]:
    """Below the system's, not pytest's: PostgreSQL's own user has to pass through all of them."""
    with tempfile.TemporaryDirectory(prefix="agent-service-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        yield directory


class Stack(stack.Stack):
    """A stack whose data may be lost, with the tests' agents, and leases short enough to see them end."""

    def __init__(self, directory: Path, reaper: Reaper) -> None:
        env = clean_env(AGENTS="app.agents,tests.agents", LEASE_SECONDS="3", DRAIN_SECONDS="4")
        super().__init__(directory, reaper=reaper, env=env, durable=False)

    def start_servers(self) -> None:
        super().start_servers()
        self.postgres.create_database(TEMPLATE, template=stack.DATABASE)

    @property
    def service(self) -> list[Process]:
        """The processes that are ours."""
        return [self.api, self.worker]

    @property
    def model_url(self) -> str:
        """The root of the stand-in model server; the OpenAI API is below `/v1`."""
        assert self.model is not None
        return self.model.address

    def rq_info(self) -> str:
        """What RQ's own tool says."""
        command = [sys.executable, "-m", "rq.cli", "info", "--url", self.redis_url]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def flush_redis(self) -> None:
        with redis.Redis.from_url(self.redis_url) as client:
            client.flushall()

    @staticmethod
    def pause() -> None:
        """A moment, before one looks again."""
        time.sleep(0.05)

    @classmethod
    def until(cls, condition: Callable[[], object], *, seconds: float = 10) -> None:
        """Wait until the condition holds."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"not within {seconds:g} s"
            cls.pause()
