"""Whoever is given personal data of a run is in its audit first; a backend's key, which wrote it, leaves no trace."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest

from app.devstack.access import make_key
from app.domain.principal import Principal, Scope
from tests.api.conftest import StartApi, client_of
from tests.scripts import DONE, Run, Script, call, rest, submit
from tests.stack import Stack
from tests.waiting import put_to_wait

Json = dict[str, Any]
BACKEND = (Scope.RUNS_READ, Scope.RUNS_WRITE)
As = Callable[..., httpx.Client]


@pytest.fixture
def caller(stack: Stack, tenant: str) -> Iterator[As]:
    """A client with a key of these scopes."""
    with ExitStack() as clients:

        def with_scopes(*scopes: Scope) -> httpx.Client:
            key = make_key(stack.database_url, tenant=tenant, name="test", scopes=scopes)
            return clients.enter_context(client_of(stack.api, key))

        yield with_scopes


@pytest.fixture
def run(stack: Stack, caller: As) -> Run:
    """A run that waits for a person, submitted by a backend."""
    script = Script(stack.model_url, [call("open_the_door"), DONE])
    backend = caller(*BACKEND)
    return rest(backend, submit(backend, "toolbox", script.input))


def reads_of(stack: Stack, run_id: str | UUID) -> list[Json]:
    """What the audit has about who read a run, asked of the database: asking the API would be one more."""
    with psycopg.connect(stack.owner_url) as connection:
        rows = connection.execute(
            "SELECT actor, data FROM audit_events WHERE run_id = %s AND kind = 'run.read' ORDER BY seq", [str(run_id)]
        )
        return [{"actor": actor, **data} for actor, data in rows]


def actor_of(client: httpx.Client) -> str:
    return "key:" + client.headers["Authorization"].split("_")[1]


@pytest.mark.parametrize(
    ("path", "what", "scope"),
    [
        ("/v1/runs/{run}", "run", Scope.RUNS_READ),
        ("/v1/runs/{run}?wait=1", "run", Scope.RUNS_READ),
        ("/v1/runs", "runs", Scope.RUNS_READ),
        ("/v1/runs/{run}/steps", "steps", Scope.RUNS_READ),
        ("/v1/runs/{run}/audit", "audit", Scope.AUDIT_READ),
        ("/v1/reviews", "reviews", Scope.REVIEWS_READ),
        ("/v1/reviews/{review}", "review", Scope.REVIEWS_READ),
    ],
)
def test_what_an_operator_is_given_is_in_the_audit(
    *, stack: Stack, caller: As, run: Run, path: str, what: str, scope: Scope
) -> None:
    with psycopg.connect(stack.owner_url) as connection:
        row = connection.execute("SELECT id FROM reviews WHERE run_id = %s", [run["id"]]).fetchone()
        assert row is not None
    address = path.format(run=run["id"], review=row[0])
    operator = caller(scope, Scope.AUDIT_READ)
    assert reads_of(stack, run["id"]) == []
    assert operator.get(address, headers={"X-Request-Id": "look"}).status_code == 200
    assert reads_of(stack, run["id"]) == [{"actor": actor_of(operator), "what": what, "request_id": "look"}]
    backend = caller(*BACKEND)
    if scope is Scope.RUNS_READ:
        assert backend.get(address).status_code == 200
    assert len(reads_of(stack, run["id"])) == 1


def test_a_list_is_recorded_of_each_run_in_it_once_and_of_no_other(stack: Stack, caller: As, tenant: str) -> None:
    older, newer = (put_to_wait(stack.database_url, tenant=tenant) for _ in range(2))
    operator = caller(Scope.REVIEWS_READ, Scope.RUNS_READ)
    for path in ("/v1/runs", "/v1/reviews"):
        operator.get(path, params={"limit": 1})
    assert [read["what"] for read in reads_of(stack, newer)] == ["runs", "reviews"]
    assert reads_of(stack, older) == []


def test_what_is_refused_or_shows_no_run_is_not_a_read(stack: Stack, caller: As, run: Run) -> None:
    operator = caller(Scope.RUNS_READ, Scope.REVIEWS_DECIDE)
    assert operator.get(f"/v1/runs/{run['id']}/audit").status_code == 403
    assert operator.get("/v1/reviews").status_code == 403
    assert operator.get("/v1/runs", params={"agent": "nobody"}).json()["data"] == []
    assert operator.get("/v1/agents").status_code == 200
    assert reads_of(stack, run["id"]) == []


def test_a_run_that_a_cancel_or_a_repeated_submission_gives_to_an_operator_is_read(
    stack: Stack, caller: As, tenant: str
) -> None:
    operator = caller(*BACKEND, Scope.REVIEWS_READ)
    body, key = {"agent": "toolbox", "input": "script:unknown"}, {"Idempotency-Key": "again"}
    run = operator.post("/v1/runs", json=body, headers=key).json()
    assert reads_of(stack, run["id"]) == [], "they wrote it a moment ago"
    assert operator.post("/v1/runs", json=body, headers=key).json()["id"] == run["id"]
    assert [read["what"] for read in reads_of(stack, run["id"])] == ["run"]
    waiting = put_to_wait(stack.database_url, tenant=tenant)
    for times in (1, 2):
        assert operator.post(f"/v1/runs/{waiting}/cancel").status_code == 202
        assert len(reads_of(stack, waiting)) == times


def test_nothing_is_given_that_cannot_be_recorded(start_api: StartApi, owner_url: str, database_url: str) -> None:
    run_id = put_to_wait(database_url, tenant="own")
    keys = {
        scopes: make_key(database_url, tenant="own", name="test", scopes=scopes) for scopes in (tuple(Scope), BACKEND)
    }
    with psycopg.connect(owner_url, autocommit=True) as connection:
        connection.execute("REVOKE EXECUTE ON FUNCTION append_audit FROM agent_service")
        api = start_api()
        with client_of(api, keys[tuple(Scope)]) as operator:
            for path in (f"/v1/runs/{run_id}", "/v1/runs", f"/v1/runs/{run_id}/steps", "/v1/reviews"):
                answer = operator.get(path)
                assert answer.status_code == 500
                assert "script:unknown" not in answer.text
        with client_of(api, keys[BACKEND]) as backend:
            assert backend.get(f"/v1/runs/{run_id}").status_code == 200


@pytest.mark.parametrize("scope", Scope)
def test_any_scope_besides_those_of_a_backend_makes_an_operator(scope: Scope) -> None:
    assert Principal("k", "t", frozenset({*BACKEND, scope}), "k").is_operator is (scope not in BACKEND)
    assert Principal("k", "t", frozenset({scope}), "k").is_operator is (scope not in BACKEND)
