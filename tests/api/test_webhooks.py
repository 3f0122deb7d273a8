"""Webhooks through the API: who may have them, what is refused, and what one sees of deliveries."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest

from app.devstack.access import make_key
from app.devstack.processes import Reaper
from app.devstack.stack import Api
from app.domain.principal import Scope
from app.webhook_signature import derive_secret, write_secret
from tests.api.conftest import StartApi, client_of
from tests.stack import TEMPLATE, Stack, clean_env
from tests.waiting import put_to_wait

Json = dict[str, Any]
KEY = "a key of the service's own, of 32 characters"
URL = "https://hooks.example.com/runs"
TRUSTED = "http://127.0.0.1:9"
TYPE = "urn:agent-service:problem:"
ALL = ["run.waiting", "run.succeeded", "run.failed", "run.cancelled"]
As = Callable[..., httpx.Client]


@dataclass(frozen=True)
class Place:
    """An API on a database that no worker looks into."""

    database_url: str
    api: Api

    def a_run_that_waits(self, tenant: str) -> UUID:
        return put_to_wait(self.database_url, tenant=tenant)

    def write(self, statement: LiteralString, *parameters: object) -> None:
        """Change what only a deliverer changes."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute(statement, parameters)


@pytest.fixture(scope="module")
def place(servers: Stack, reaper: Reaper) -> Iterator[Place]:
    name = f"test_{uuid4().hex}"
    servers.postgres.create_database(name, template=TEMPLATE)
    database_url = servers.postgres.service_url(name)
    api = Api("own-api", log=servers.directory / f"{name}.log", reaper=reaper)
    own = {"WEBHOOK_SIGNING_KEY": KEY, "EGRESS_TRUSTED_ORIGINS": TRUSTED}
    api.env = clean_env(DATABASE_URL=database_url, REDIS_URL=servers.valkey.url(2)) | api.own_env | own
    api.start()
    yield Place(database_url, api)
    api.stop()
    servers.postgres.drop_database(name)


@pytest.fixture
def caller(place: Place, tenant: str) -> Iterator[As]:
    """A client with a key of these scopes; of `admin` by default."""
    with ExitStack() as clients:

        def of(*scopes: Scope, tenant: str = tenant) -> httpx.Client:
            key = make_key(place.database_url, tenant=tenant, name="test", scopes=scopes or (Scope.ADMIN,))
            return clients.enter_context(client_of(place.api, key))

        yield of


@pytest.fixture
def admin(caller: As) -> httpx.Client:
    return caller()


def created(client: httpx.Client, **body: Any) -> Json:
    response = client.post("/v1/webhooks", json={"url": URL, **body})
    assert response.status_code == 201, response.text
    webhook: Json = response.json()
    return webhook


def data_of(client: httpx.Client, path: str, **params: Any) -> list[Json]:
    response = client.get(path, params=params)
    assert response.status_code == 200, response.text
    data: list[Json] = response.json()["data"]
    return data


def problem_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["type"]).removeprefix(TYPE)


# --- webhooks -------------------------------------------------------------------------------------------------------


def test_a_new_webhook_is_shown_with_its_secret_once(admin: httpx.Client) -> None:
    response = admin.post("/v1/webhooks", json={"url": URL})
    assert response.status_code == 201
    webhook = response.json()
    assert response.headers["Location"] == f"/v1/webhooks/{webhook['id']}"
    secret = webhook.pop("secret")
    assert secret == write_secret(derive_secret(KEY, UUID(webhook["id"])))
    assert (webhook["url"], webhook["events"]) == (URL, ALL)
    assert webhook["created_by"] == "key:" + admin.headers["Authorization"].split("_")[1]
    assert (webhook["disabled_at"], webhook["disabled_why"], webhook["failing_since"]) == (None, None, None)
    assert admin.get(response.headers["Location"]).json() == webhook
    assert data_of(admin, "/v1/webhooks") == [webhook]
    assert secret not in admin.get("/v1/webhooks").text


def test_a_webhook_has_the_events_that_were_asked_for(admin: httpx.Client) -> None:
    webhook = created(admin, events=["run.failed", "run.waiting", "run.failed"])
    assert webhook["events"] == ["run.waiting", "run.failed"]


def test_webhooks_are_listed_page_by_page_the_newest_first(admin: httpx.Client) -> None:
    made = [created(admin)["id"] for _ in range(5)]
    seen: list[str] = []
    params: Json = {"limit": 2}
    while True:
        page = admin.get("/v1/webhooks", params=params).json()
        seen += [webhook["id"] for webhook in page["data"]]
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
    assert seen == made[::-1]


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/",
        "ftp://hooks.example.com/",
        "https://",
        "https:///path",
        "hooks.example.com",
        "https://user@hooks.example.com/",
        "https://user:secret@hooks.example.com/",
        "https://127.0.0.1/",
        "https://10.1.2.3/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://169.254.169.254/latest/meta-data/",
        "https://2130706433/",
        "https://0x7f.1/",
        "https://hooks.example.com:0/",
        "https://hooks.example.com:65536/",
        "https://hooks.example.com/\r\nHost: evil",
        "https://hooks.example.com/ a",
        "http://127.0.0.1:8/",
        "javascript:alert(1)",
        "",
        "https://hooks.example.com/" + "a" * 2_048,
    ],
)
def test_an_address_that_may_not_be_asked_is_refused(admin: httpx.Client, url: str) -> None:
    response = admin.post("/v1/webhooks", json={"url": url})
    assert problem_of(response, 422) == "invalid-request"
    assert [error["pointer"] for error in response.json()["errors"]] == ["#/url"]
    assert data_of(admin, "/v1/webhooks") == []


def test_a_trusted_origin_may_be_private_and_without_https(admin: httpx.Client) -> None:
    assert created(admin, url=f"{TRUSTED}/hook")["url"] == f"{TRUSTED}/hook"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "#/url"),
        ({"url": 7}, "#/url"),
        ({"url": URL, "events": []}, "#/events"),
        ({"url": URL, "events": ["run.exploded"]}, "#/events/0"),
        ({"url": URL, "events": "run.failed"}, "#/events"),
        ({"url": URL, "events": ["run.failed"] * 17}, "#/events"),
        ({"url": URL, "secret": "mine"}, "#/secret"),
        ({"url": URL, "tenant": "other"}, "#/tenant"),
    ],
)
def test_a_body_that_is_not_as_documented_is_refused(admin: httpx.Client, body: Json, pointer: str) -> None:
    response = admin.post("/v1/webhooks", json=body)
    assert problem_of(response, 422) == "invalid-request"
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]


def test_a_tenant_has_ten_webhooks_at_most_also_when_it_asks_for_all_at_once(admin: httpx.Client, caller: As) -> None:
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: admin.post("/v1/webhooks", json={"url": URL}), range(20)))
    assert sorted(answer.status_code for answer in answers) == [201] * 10 + [409] * 10
    assert {problem_of(answer, 409) for answer in answers if answer.status_code != 201} == {"too-many-webhooks"}
    created(caller(tenant="other"))
    [newest, *_] = data_of(admin, "/v1/webhooks")
    assert admin.delete(f"/v1/webhooks/{newest['id']}").status_code == 204
    created(admin)


def test_a_webhook_that_was_deleted_is_gone(admin: httpx.Client) -> None:
    webhook = created(admin)
    response = admin.delete(f"/v1/webhooks/{webhook['id']}")
    assert (response.status_code, response.content) == (204, b"")
    for gone in (admin.delete, admin.get):
        assert problem_of(gone(f"/v1/webhooks/{webhook['id']}"), 404) == "not-found"
    assert data_of(admin, "/v1/webhooks") == []


def test_without_a_key_to_sign_with_there_are_no_webhooks(start_api: StartApi, own_key: str) -> None:
    with client_of(start_api(), own_key) as client:
        response = client.post("/v1/webhooks", json={"url": URL})
        assert problem_of(response, 409) == "webhooks-off"
        assert data_of(client, "/v1/webhooks") == []


# --- deliveries -----------------------------------------------------------------------------------------------------


def test_deliveries_are_seen_from_the_webhook_and_from_the_run(admin: httpx.Client, place: Place, tenant: str) -> None:
    webhook, other = created(admin), created(admin)
    run_ids = [place.a_run_that_waits(tenant) for _ in range(3)]
    path = f"/v1/webhooks/{webhook['id']}/deliveries"
    found = data_of(admin, path)
    assert [delivery["run_id"] for delivery in found] == [str(run_id) for run_id in run_ids[::-1]]
    newest = found[0]
    assert newest == {
        "id": newest["id"],
        "webhook_id": webhook["id"],
        "run_id": str(run_ids[-1]),
        "event": "run.waiting",
        "status": "pending",
        "attempts": 0,
        "last_status": None,
        "last_error": None,
        "next_attempt_at": newest["created_at"],
        "created_at": newest["created_at"],
        "ended_at": None,
    }
    of_run = data_of(admin, f"/v1/runs/{run_ids[-1]}/deliveries")
    assert {delivery["webhook_id"] for delivery in of_run} == {webhook["id"], other["id"]}
    assert newest in of_run

    page = admin.get(path, params={"limit": 2}).json()
    rest = admin.get(path, params={"limit": 2, "cursor": page["next_cursor"]}).json()
    assert page["data"] + rest["data"] == found
    assert rest["next_cursor"] is None


def test_a_run_s_deliveries_outlive_the_webhook(admin: httpx.Client, place: Place, tenant: str) -> None:
    webhook = created(admin)
    run_id = place.a_run_that_waits(tenant)
    admin.delete(f"/v1/webhooks/{webhook['id']}")
    [delivery] = data_of(admin, f"/v1/runs/{run_id}/deliveries")
    assert delivery["webhook_id"] == webhook["id"]
    assert problem_of(admin.get(f"/v1/webhooks/{webhook['id']}/deliveries"), 404) == "not-found"


def test_a_failed_delivery_says_why_and_can_be_asked_for_again(admin: httpx.Client, place: Place, tenant: str) -> None:
    webhook = created(admin)
    place.a_run_that_waits(tenant)
    path = f"/v1/webhooks/{webhook['id']}/deliveries"
    [pending] = data_of(admin, path)
    place.write(
        "UPDATE webhook_deliveries SET status = 'failed', attempts = 10, last_error = 'refused',"
        " ended_at = '2026-01-01Z' WHERE id = %s",
        pending["id"],
    )
    [failed] = data_of(admin, path)
    assert (failed["status"], failed["attempts"], failed["last_error"]) == ("failed", 10, "refused")
    assert (failed["next_attempt_at"], failed["ended_at"]) == (None, "2026-01-01T00:00:00Z")
    response = admin.post(f"{path}/{pending['id']}/redeliver")
    assert response.status_code == 202
    again = response.json()
    assert (again["id"], again["status"], again["attempts"], again["ended_at"]) == (pending["id"], "pending", 0, None)
    assert again["next_attempt_at"] > pending["next_attempt_at"]
    assert data_of(admin, path) == [again]
    assert problem_of(admin.post(f"{path}/{uuid4()}/redeliver"), 404) == "not-found"


def test_a_disabled_webhook_says_why_and_is_sent_nothing_again(admin: httpx.Client, place: Place, tenant: str) -> None:
    webhook = created(admin)
    place.a_run_that_waits(tenant)
    path = f"/v1/webhooks/{webhook['id']}/deliveries"
    [delivery] = data_of(admin, path)
    place.write(
        "UPDATE webhooks SET disabled_at = now(), disabled_why = 'the endpoint answered 410 Gone' WHERE id = %s",
        webhook["id"],
    )
    found = admin.get(f"/v1/webhooks/{webhook['id']}").json()
    assert found["disabled_at"] is not None
    assert found["disabled_why"] == "the endpoint answered 410 Gone"
    response = admin.post(f"{path}/{delivery['id']}/redeliver")
    assert problem_of(response, 409) == "webhook-disabled"
    assert "410 Gone" in response.json()["detail"]


# --- who may ---------------------------------------------------------------------------------------------------------


def test_nobody_sees_or_touches_the_webhooks_of_another_tenant(
    admin: httpx.Client, caller: As, place: Place, tenant: str
) -> None:
    webhook = created(admin)
    run_id = place.a_run_that_waits(tenant)
    path = f"/v1/webhooks/{webhook['id']}"
    [delivery] = data_of(admin, f"{path}/deliveries")
    stranger = caller(tenant="stranger")
    own = created(stranger)
    again = f"deliveries/{delivery['id']}/redeliver"
    for response in (
        stranger.get(path),
        stranger.delete(path),
        stranger.get(f"{path}/deliveries"),
        stranger.get(f"/v1/runs/{run_id}/deliveries"),
        stranger.post(f"{path}/{again}"),
        stranger.post(f"/v1/webhooks/{own['id']}/{again}"),
    ):
        assert problem_of(response, 404) == "not-found"
    assert [found["id"] for found in data_of(stranger, "/v1/webhooks")] == [own["id"]]
    assert data_of(stranger, f"/v1/webhooks/{own['id']}/deliveries") == []
    assert data_of(admin, f"{path}/deliveries") == [delivery]


def test_webhooks_are_for_admins_and_a_run_s_deliveries_for_its_readers(
    admin: httpx.Client, caller: As, place: Place, tenant: str
) -> None:
    webhook = created(admin)
    run_id = place.a_run_that_waits(tenant)
    path = f"/v1/webhooks/{webhook['id']}"
    reader = caller(*(set(Scope) - {Scope.ADMIN}))
    for response in (
        reader.post("/v1/webhooks", json={"url": URL}),
        reader.get("/v1/webhooks"),
        reader.get(path),
        reader.delete(path),
        reader.get(f"{path}/deliveries"),
        reader.post(f"{path}/deliveries/{uuid4()}/redeliver"),
    ):
        assert problem_of(response, 403) == "missing-scope"
    [delivery] = data_of(reader, f"/v1/runs/{run_id}/deliveries")
    assert delivery["event"] == "run.waiting"
    writer = caller(Scope.RUNS_WRITE)
    assert problem_of(writer.get(f"/v1/runs/{run_id}/deliveries"), 403) == "missing-scope"
