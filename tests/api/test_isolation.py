"""A key gets as far as its tenant and its scopes, at every operation there is: the cases come from the document."""

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import product
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from psycopg.rows import dict_row
from pytest import Subtests

from app.api.errors import PROBLEM_JSON
from app.db import keys
from app.db.engine import make_engine
from app.devstack.access import make_key
from app.devstack.stack import Api
from app.domain.ids import new_id
from app.domain.principal import Scope
from app.webhook_signature import new_signing_key
from tests.api.conftest import StartApi, client_of
from tests.waiting import put_to_wait

Json = dict[str, Any]

OPEN = {"live", "ready", "health", "version", "metrics"}
"""What may be asked without a key: nothing of any tenant is in it."""
ALSO_GOOD = {Scope.REVIEWS_DECIDE: {Scope.REVIEWS_ESCALATED}}
"""Scopes that get past the door in another's place; the review's queue says which of the two it takes."""
NOT_ADMINS = {Scope.SCALING_READ}
"""What is about no tenant is not included in the scope of a tenant's administrator."""


@dataclass(frozen=True)
class Operation:
    """One of the document's."""

    name: str
    method: str
    path: str
    scopes: tuple[Scope, ...] | None
    body: Json | None

    @property
    def parameters(self) -> list[str]:
        return re.findall(r"{(\w+)}", self.path)

    def send(self, client: httpx.Client, ids: dict[str, str]) -> httpx.Response:
        return client.request(self.method, self.path.format(**ids), json=self.body)


@dataclass(frozen=True)
class Tenancy:
    """A tenant with one of everything that has an id, and a key for all of it."""

    name: str
    client: httpx.Client
    ids: dict[str, str]


def operations_of(document: Json) -> list[Operation]:
    return [
        Operation(
            operation["operationId"],
            method.upper(),
            path,
            tuple(Scope(scope) for scope in operation["security"][0]["apiKey"]) if "security" in operation else None,
            _example(document, operation),
        )
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]


def _example(document: Json, operation: Json) -> Json | None:
    if "requestBody" not in operation:
        return None
    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    example: Json = document["components"]["schemas"][name]["examples"][0]
    return example


@pytest.fixture
def api(start_api: StartApi) -> Api:
    """Without a worker: nothing changes but by what is asked of it."""
    return start_api(WEBHOOK_SIGNING_KEY=new_signing_key())


@pytest.fixture
def operations(api: Api) -> list[Operation]:
    document: Json = httpx.get(f"{api.address}/openapi.json", trust_env=False).json()
    found = operations_of(document)
    assert len(found) >= 14
    return found


@contextmanager
def settled(api: Api, database_url: str, tenant: str) -> Iterator[Tenancy]:
    with client_of(api, make_key(database_url, tenant=tenant, name="all")) as client:
        webhook = client.post("/v1/webhooks", json={"url": "https://hooks.example.com/runs"}).json()["id"]
        run = str(put_to_wait(database_url, tenant=tenant))
        review = client.get("/v1/reviews").json()["data"][0]["id"]
        delivery = client.get(f"/v1/webhooks/{webhook}/deliveries").json()["data"][0]["id"]
        ids = {"run_id": run, "review_id": review, "webhook_id": webhook, "delivery_id": delivery}
        yield Tenancy(tenant, client, ids)


@pytest.fixture
def owner(api: Api, database_url: str) -> Iterator[Tenancy]:
    with settled(api, database_url, "owner") as tenancy:
        yield tenancy


@pytest.fixture
def stranger(api: Api, database_url: str) -> Iterator[Tenancy]:
    with settled(api, database_url, "stranger") as tenancy:
        yield tenancy


@pytest.fixture
def client_with(api: Api, database_url: str) -> Iterator[Callable[[Iterable[Scope]], httpx.Client]]:
    """A client whose key has these scopes."""
    with ExitStack() as stack:

        @cache
        def client(scopes: frozenset[Scope]) -> httpx.Client:
            return stack.enter_context(client_of(api, make_key(database_url, tenant="t", name="some", scopes=scopes)))

        yield lambda scopes: client(frozenset(scopes))


def id_of(tenancy: Tenancy, parameter: str) -> str:
    """Fails where nobody has said how to get one."""
    assert parameter in tenancy.ids, f"path parameter {parameter}: let `settled` make something that has such an id"
    return tenancy.ids[parameter]


def seen(response: httpx.Response, ids: Iterable[str]) -> tuple[int, dict[str, str], str]:
    """The answer, but for the ids that were asked for and those of the request."""
    text = response.text.replace(response.headers["x-request-id"], "REQUEST")
    for known in ids:
        text = text.replace(known, "ID").replace(known.replace("-", ""), "TRACE")
    varying = ("date", "x-request-id", "content-length")
    return response.status_code, {k: v for k, v in response.headers.items() if k not in varying}, text


def rows_of(owner_url: str, tenant: str) -> dict[str, list[Json]]:
    """Everything in the database that is this tenant's, or about its runs; but not when its keys were used."""
    with psycopg.connect(owner_url, autocommit=True, row_factory=dict_row) as db:
        columns = db.execute(
            "SELECT table_name, array_agg(column_name::text) AS names FROM information_schema.columns"
            " WHERE table_schema = 'public' GROUP BY table_name"
        ).fetchall()
        runs = [row["id"] for row in db.execute("SELECT id FROM runs WHERE tenant = %s", [tenant])]
        found = {}
        for table, names in ((row["table_name"], row["names"]) for row in columns):
            if "tenant" in names:
                rows = db.execute(
                    f"SELECT to_jsonb(t) - 'last_used_at' AS r FROM \"{table}\" t WHERE tenant = %s", [tenant]
                )
            elif "run_id" in names:
                rows = db.execute(f'SELECT to_jsonb(t) AS r FROM "{table}" t WHERE run_id = ANY(%s)', [runs])
            else:
                continue
            found[table] = sorted((row["r"] for row in rows), key=json.dumps)
    return found


def test_another_tenant_s_things_look_as_if_they_did_not_exist(
    operations: list[Operation], owner: Tenancy, stranger: Tenancy, owner_url: str, subtests: Subtests
) -> None:
    before = rows_of(owner_url, owner.name)
    assert {table for table, rows in before.items() if rows} >= {"runs", "reviews", "webhooks", "webhook_deliveries"}
    for operation in operations:
        for whose in product(("own", "foreign"), repeat=len(operation.parameters)):
            if "foreign" not in whose:
                continue
            choice = dict(zip(operation.parameters, whose, strict=True))
            with subtests.test(operation.name, **choice):
                own = {name: id_of(stranger, name) for name in choice}
                foreign = {name: id_of(owner, name) if of == "foreign" else own[name] for name, of in choice.items()}
                missing = {name: str(new_id()) if of == "foreign" else own[name] for name, of in choice.items()}
                answer = operation.send(stranger.client, foreign)
                assert answer.status_code == 404
                assert seen(answer, foreign.values()) == seen(
                    operation.send(stranger.client, missing), missing.values()
                )
    assert rows_of(owner_url, owner.name) == before


def test_no_answer_tells_of_another_tenant(
    operations: list[Operation], owner: Tenancy, stranger: Tenancy, subtests: Subtests
) -> None:
    for operation in operations:
        if operation.method == "GET":
            with subtests.test(operation.name):
                answer = operation.send(stranger.client, {name: id_of(stranger, name) for name in operation.parameters})
                assert answer.status_code == 200, answer.text
                for told in (*owner.ids.values(), owner.name):
                    assert told not in answer.text


def test_what_the_owner_asks_for_is_there(operations: list[Operation], owner: Tenancy, subtests: Subtests) -> None:
    """So that a 404 of the tests above says what it seems to say. What deletes comes last."""
    for operation in sorted(operations, key=lambda operation: operation.method == "DELETE"):
        with subtests.test(operation.name):
            answer = operation.send(owner.client, {name: id_of(owner, name) for name in operation.parameters})
            assert answer.status_code != 404


def test_every_operation_wants_a_key_that_is_good(
    operations: list[Operation], api: Api, database_url: str, subtests: Subtests
) -> None:
    good = make_key(database_url, tenant="t", name="good")
    bad = {
        "none": {},
        "empty": {"Authorization": ""},
        "no key": {"Authorization": "Bearer"},
        "unknown": {"Authorization": f"Bearer ask_{uuid4().hex[:12]}_{'x' * 43}"},
        "wrong secret": {"Authorization": f"Bearer {good[:-6]}nosuch"},
        "revoked": {"Authorization": f"Bearer {asyncio.run(_key_that_was(database_url, revoked=True))}"},
        "expired": {"Authorization": f"Bearer {asyncio.run(_key_that_was(database_url, revoked=False))}"},
        "wrong scheme": {"Authorization": f"Basic {good}"},
        "in a cookie": {"Cookie": f"Authorization=Bearer {good}"},
        "in another header": {"X-Api-Key": good},
    }
    for operation in operations:
        if operation.scopes is None:
            assert operation.name in OPEN, f"{operation.name}: says that it needs no key"
            continue
        ids = {name: str(uuid4()) for name in operation.parameters}
        for what, headers in bad.items():
            with (
                subtests.test(operation.name, key=what),
                httpx.Client(base_url=api.address, headers=headers, trust_env=False) as client,
            ):
                answer = operation.send(client, ids)
                assert answer.status_code == 401
                assert answer.headers["content-type"] == PROBLEM_JSON
                assert answer.json()["type"] == "urn:agent-service:problem:unauthorized"
                assert answer.headers["www-authenticate"].startswith("Bearer ")


async def _key_that_was(database_url: str, *, revoked: bool) -> str:
    """A key that was revoked, or has expired."""
    engine = make_engine(database_url, pool_size=1, application_name="test")
    past = datetime.now(UTC) - timedelta(seconds=1)
    async with engine.connect() as connection:
        key = await keys.create(
            connection, tenant="t", name="was", scopes=frozenset(Scope), expires_at=None if revoked else past
        )
        if revoked:
            assert await keys.revoke(connection, key.split("_")[1])
    await engine.dispose()
    return key


def test_each_scope_that_an_operation_needs_is_needed(
    operations: list[Operation], client_with: Callable[[Iterable[Scope]], httpx.Client], subtests: Subtests
) -> None:
    for operation in operations:
        for scope in operation.scopes or ():
            with subtests.test(operation.name, without=scope):
                others = set(Scope) - {scope, Scope.ADMIN} - ALSO_GOOD.get(scope, set())
                answer = operation.send(client_with(others), {name: str(uuid4()) for name in operation.parameters})
                assert answer.status_code == 403
                assert answer.json()["type"] == "urn:agent-service:problem:missing-scope"
                assert scope in answer.json()["detail"]
                assert f'scope="{scope}"' in answer.headers["www-authenticate"]


def test_the_scopes_that_an_operation_names_are_enough_and_so_is_admin(
    operations: list[Operation], client_with: Callable[[Iterable[Scope]], httpx.Client], subtests: Subtests
) -> None:
    for operation in operations:
        named = operation.scopes or ()
        for scopes in (named, (Scope.ADMIN,)):
            with subtests.test(operation.name, scopes=scopes):
                answer = operation.send(client_with(scopes), {name: str(uuid4()) for name in operation.parameters})
                is_refused = scopes != named and not NOT_ADMINS.isdisjoint(named)
                assert (answer.status_code in (401, 403)) is is_refused
