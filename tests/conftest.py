"""What every test may ask for. All of it is real; each pytest process has a stack of its own.

servers       PostgreSQL, Valkey and the stand-in model server, started once
stack         the same, and the API and a worker as processes
client        an HTTP client of the API with a key of this test's own `tenant`
database_url  a migrated database of this test's own, as the service's user; `owner_url` as its owner
redis_url     an empty Redis database
settings      the settings of a process on these two
"""

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import redis
from pydantic import SecretStr

from app.config import Settings
from app.devstack.access import make_key
from app.devstack.processes import Reaper
from tests.faults.report import PROPERTY, table
from tests.stack import TEMPLATE, Stack, new_directory


@pytest.fixture(scope="session")
def reaper() -> Iterator[Reaper]:
    with Reaper() as reaper:
        yield reaper


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> None:
    """What the developer's shell sets for the service is not meant for the tests."""
    for name in Settings.model_fields:
        os.environ.pop(name.upper(), None)
    os.environ["SECRETS_DIR"] = os.devnull


@pytest.fixture
def directory() -> Iterator[Path]:
    """For servers of this test's own."""
    with new_directory() as directory:
        yield directory


@pytest.fixture(scope="session")
def servers(reaper: Reaper) -> Iterator[Stack]:
    with new_directory() as directory:
        stack = Stack(directory, reaper)
        try:
            stack.start_servers()
            yield stack
        finally:
            stack.stop()


@pytest.fixture(scope="session")
def _service(servers: Stack) -> Stack:
    servers.start_service()
    return servers


@pytest.fixture
def stack(_service: Stack) -> Stack:
    """Everything runs: what an earlier test has left stopped is started again."""
    for process in _service.processes:
        if not process.is_running:
            process.start()
    return _service


@pytest.fixture
def tenant() -> str:
    return f"tenant-{uuid4().hex[:12]}"


@pytest.fixture
def client(stack: Stack, tenant: str) -> Iterator[httpx.Client]:
    key = make_key(stack.database_url, tenant=tenant, name="test")
    headers = {"Authorization": f"Bearer {key}"}
    # `verify` only because loading the certificates that nobody needs here would take 40 ms a test.
    with httpx.Client(base_url=stack.api.address, headers=headers, timeout=30, trust_env=False, verify=False) as client:
        yield client


@pytest.fixture
def database_url(servers: Stack) -> Iterator[str]:
    name = f"test_{uuid4().hex}"
    servers.postgres.create_database(name, template=TEMPLATE)
    yield servers.postgres.service_url(name)
    servers.postgres.drop_database(name)


@pytest.fixture
def owner_url(servers: Stack, database_url: str) -> str:
    """The same database, as its owner."""
    return servers.postgres.url(database_url.rpartition("/")[2])


@pytest.fixture
def redis_url(servers: Stack) -> str:
    url = servers.valkey.url(1)
    with redis.Redis.from_url(url) as connection:
        connection.flushdb()
    return url


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return Settings(
        database_url=SecretStr(database_url), redis_url=SecretStr(redis_url), agents=("app.agents", "tests.agents")
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Beside the failure of a test that used the stack, show what the API and the worker said last."""
    report = yield
    stacks = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Stack)]
    if report.failed:
        for process in (process for stack in stacks for process in stack.service if process.was_started):
            report.sections.append((f"{process.name}: end of the log", process.tail(15)))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the fault suite found, as a table."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    found = [value for report in reports for name, value in report.user_properties if name == PROPERTY]
    if lines := table(found):
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line(line)
