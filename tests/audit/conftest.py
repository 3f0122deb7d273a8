"""A database with real runs, made once by an API and a worker of its own; each test gets a copy of it."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from app.audit.keys import new_private_key_pem
from app.audit.offline import verify_export
from app.devstack.access import make_key
from tests.audit.evidence import Check, Evidence, Export, run_to_rest
from tests.scripts import DONE, call, calls
from tests.stack import TEMPLATE, Stack, new_directory

ORIGINAL = "audit_original"
REDIS_DATABASE = 7


@pytest.fixture(scope="session")
def original(servers: Stack) -> Iterator[Evidence]:
    """Runs of two tenants in every state, two checkpoints, and events that none of them has seen. Not to be changed."""
    with new_directory() as directory:
        owner_url = servers.postgres.create_database(ORIGINAL, template=TEMPLATE)
        evidence = Evidence(
            database_url=servers.postgres.service_url(ORIGINAL),
            owner_url=owner_url,
            anchor=directory / "anchor.jsonl",
            private_pem=new_private_key_pem(),
        )
        env = {
            "DATABASE_URL": evidence.database_url,
            "REDIS_URL": servers.valkey.url(REDIS_DATABASE),
            "AUDIT_SIGNING_KEY": "",  # sealed here, when the test wants it
        }
        api, worker = servers.another_api("audit-api", **env), servers.another_worker("audit-worker", **env)
        try:
            api.start()
            worker.start()
            _fill(evidence, api.address, servers.model_url)
        finally:
            worker.stop()
            api.stop()
        yield evidence


def _fill(evidence: Evidence, address: str, model_url: str) -> None:
    keys = {name: make_key(evidence.database_url, tenant=name, name="test") for name in ("shop", "bank")}
    shop, bank = (
        httpx.Client(
            base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=30, trust_env=False, verify=False
        )
        for key in keys.values()
    )
    with shop, bank:
        two_calls = [calls(("echo", {"text": "one"}), ("tag", {"name": "two"})), DONE]
        runs = evidence.runs
        runs["succeeded"] = run_to_rest(shop, model_url, two_calls)
        runs["alike"] = run_to_rest(shop, model_url, two_calls)
        runs["of another tenant"] = run_to_rest(bank, model_url, [call("charge", {"amount": "5"}), DONE])
        evidence.seal()
        runs["failed"] = run_to_rest(shop, model_url, [call("echo", {"text": "again"})] * 8)
        runs["waiting"] = run_to_rest(shop, model_url, [call("open_the_door"), DONE])
        runs["cancelled"] = run_to_rest(shop, model_url, [call("open_the_door"), DONE])
        assert shop.post(f"/v1/runs/{runs['cancelled']}/cancel").status_code == 202
        evidence.seal()
        runs["not sealed"] = run_to_rest(shop, model_url, two_calls)
        assert shop.get(f"/v1/runs/{runs['failed']}").status_code == 200  # one more event, after those that are sealed


@pytest.fixture
def evidence(original: Evidence, servers: Stack, tmp_path: Path) -> Iterator[Evidence]:
    """A copy of its own, to be changed."""
    name = f"audit_{uuid4().hex}"
    owner_url = servers.postgres.create_database(name, template=ORIGINAL)
    anchor = tmp_path / "anchor.jsonl"
    shutil.copy(original.anchor, anchor)
    yield replace(original, database_url=servers.postgres.service_url(name), owner_url=owner_url, anchor=anchor)
    servers.postgres.drop_database(name)


@pytest.fixture
def export(evidence: Evidence, tmp_path: Path) -> Export:
    """Writes an export and returns its file."""

    def write(*words: str, name: str = "audit.jsonl") -> Path:
        file = tmp_path / name
        result = evidence.audit("export", *words, str(file))
        assert result.exit_code == 0, result.output
        return file

    return write


@pytest.fixture
def check(evidence: Evidence) -> Check:
    public_key = evidence.anchor.with_name("audit-public-key.pem")
    return lambda file: verify_export(file, [public_key], evidence.anchor)
