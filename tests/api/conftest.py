"""API processes of a test's own, where the shared one would be in the way."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from app.devstack.access import make_key
from app.devstack.processes import Reaper
from app.devstack.stack import Api
from tests.stack import clean_env

StartApi = Callable[..., Api]


@pytest.fixture
def start_api(tmp_path: Path, reaper: Reaper, database_url: str, redis_url: str) -> Iterator[StartApi]:
    """Starts an API on a database of this test's own, with further environment variables."""
    with ExitStack() as stack:

        def start(**env: str) -> Api:
            api = Api("own-api", log=tmp_path / "api.log", reaper=reaper)
            stack.callback(api.stop)
            api.env = clean_env(DATABASE_URL=database_url, REDIS_URL=redis_url) | api.own_env | env
            api.start()
            return api

        yield start


@pytest.fixture
def own_key(database_url: str) -> str:
    return make_key(database_url, tenant="own", name="test")


def client_of(api: Api, key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=api.address, headers=headers, timeout=30, trust_env=False)
