"""Who is let in: keys that are good, from the moment they are made to the moment they are revoked."""

import asyncio
import time
from datetime import timedelta
from pathlib import Path

import httpx
import psycopg

from app.db import keys
from app.db.engine import make_engine
from app.devstack.access import id_of, make_key, replace_key
from app.devstack.ports import free_port
from app.domain.principal import Scope
from app.key_usage import MAX_KEYS, KeyUsage
from tests.api.conftest import StartApi, client_of
from tests.stack import Stack


def asked_with(api_url: str, authorization: str) -> httpx.Response:
    headers = {"Authorization": authorization, "X-Request-Id": "the-same"}
    return httpx.get(f"{api_url}/v1/agents", headers=headers, trust_env=False, timeout=30)


def last_used(database_url: str, key: str) -> float | None:
    """Seconds ago, by the database's clock."""
    statement = "SELECT extract(epoch FROM clock_timestamp() - last_used_at) FROM api_keys WHERE id = %s"
    with psycopg.connect(database_url) as connection:
        row = connection.execute(statement, [id_of(key)]).fetchone()
    assert row is not None
    return None if row[0] is None else float(row[0])


# -- good or not


def test_an_unknown_key_and_a_wrong_secret_get_the_same_answer(stack: Stack, tenant: str) -> None:
    key = make_key(stack.database_url, tenant=tenant, name="test")
    prefix, key_id, secret = key.split("_", 2)
    wrong = f"{prefix}_{key_id}_{secret[::-1]}"
    unknown = f"{prefix}_{'0' * 12}_{secret}"
    answers = [asked_with(stack.api.address, f"Bearer {presented}") for presented in (wrong, unknown)]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert answers[0].content == answers[1].content
    different = [{**answer.headers, "date": ""} for answer in answers]
    assert different[0] == different[1]


def test_what_cannot_be_a_key_does_not_reach_the_database(start_api: StartApi) -> None:
    away = f"postgresql://agent:hunter2@127.0.0.1:{free_port()}/agents"
    key = f"ask_{'0' * 12}_{'x' * 43}"
    malformed = [
        *(key[:-1], key + "A", key.upper(), key.replace("ask_", "sk_"), key.replace("_", "-"), f"{key},{key}"),
        *(f"{key[:-1]}é", f"ask_{'0' * 13}_{'x' * 43}", f"ask_ABCDEF012345_{'x' * 43}", f"ask_{'x' * 30_000}", "ask__"),
    ]
    with httpx.Client(base_url=start_api(DATABASE_URL=away).address, timeout=30, trust_env=False) as client:

        def answer(presented: str) -> int:
            headers = [(b"Authorization", f"Bearer {presented}".encode("latin-1"))]
            return client.get("/v1/agents", headers=headers).status_code

        assert answer(key) == 503
        assert [answer(presented) for presented in malformed] == [401] * len(malformed)


def test_a_key_is_refused_from_the_moment_it_is_revoked(stack: Stack, tenant: str) -> None:
    key = make_key(stack.database_url, tenant=tenant, name="test")
    with client_of(stack.api, key) as client:
        assert client.get("/v1/agents").status_code == 200
        with psycopg.connect(stack.database_url) as connection:
            connection.execute("UPDATE api_keys SET revoked_at = now() WHERE id = %s", [id_of(key)])
        assert client.get("/v1/agents").status_code == 401


def test_a_key_is_refused_from_the_moment_it_expires(stack: Stack, tenant: str) -> None:
    key = make_key(stack.database_url, tenant=tenant, name="test")
    with psycopg.connect(stack.database_url) as connection:
        connection.execute("UPDATE api_keys SET expires_at = now() + interval '0.5 s' WHERE id = %s", [id_of(key)])
    with client_of(stack.api, key) as client:
        assert client.get("/v1/agents").status_code == 200
        time.sleep(0.6)
        assert client.get("/v1/agents").status_code == 401


def test_both_keys_are_good_while_one_replaces_the_other(stack: Stack, tenant: str) -> None:
    old = make_key(stack.database_url, tenant=tenant, name="test", scopes=[Scope.RUNS_READ, Scope.RUNS_WRITE])
    new = replace_key(stack.database_url, old, overlap=timedelta(seconds=1))
    with client_of(stack.api, old) as before, client_of(stack.api, new) as after:
        run = before.post("/v1/runs", json={"agent": "toolbox", "input": "script:unknown"}).json()
        assert after.get(f"/v1/runs/{run['id']}").status_code == 200
        assert after.get("/v1/reviews").status_code == 403
        time.sleep(1.1)
        assert before.get(f"/v1/runs/{run['id']}").status_code == 401
        assert after.get(f"/v1/runs/{run['id']}").status_code == 200


def test_without_an_overlap_the_old_key_is_refused_at_once(stack: Stack, tenant: str) -> None:
    old = make_key(stack.database_url, tenant=tenant, name="test")
    with client_of(stack.api, old) as before:
        assert before.get("/v1/agents").status_code == 200
        new = replace_key(stack.database_url, old, overlap=timedelta(0))
        assert before.get("/v1/agents").status_code == 401
    with client_of(stack.api, new) as after:
        assert after.get("/v1/agents").status_code == 200


# -- last used


def test_requests_do_not_write_when_a_key_was_used_but_the_end_of_the_process_does(
    start_api: StartApi, database_url: str
) -> None:
    used, refused, idle = (make_key(database_url, tenant="own", name=name) for name in ("used", "refused", "idle"))
    api = start_api()
    with client_of(api, used) as client:
        for _ in range(3):
            assert client.get("/v1/agents").status_code == 200
    with client_of(api, refused[:-4] + "AAAA") as client:
        assert client.get("/v1/agents").status_code == 401
    assert last_used(database_url, used) is None
    time.sleep(0.5)
    api.stop()
    ago = last_used(database_url, used)
    assert ago is not None
    assert 0.5 <= ago < 20
    assert last_used(database_url, refused) is None
    assert last_used(database_url, idle) is None


def test_a_process_writes_in_the_background_which_keys_were_used(database_url: str) -> None:
    first, second = (make_key(database_url, tenant="own", name=name) for name in ("first", "second"))

    async def use() -> None:
        engine = make_engine(database_url, pool_size=1, application_name="test")
        usage = KeyUsage(engine, every_s=0.05)
        async with usage.running():
            usage.note(id_of(first))
            while last_used(database_url, first) is None:
                await asyncio.sleep(0.02)
            usage.note(id_of(second))
            usage.note(id_of(first))
            while last_used(database_url, second) is None:
                await asyncio.sleep(0.02)
        await engine.dispose()

    asyncio.run(asyncio.wait_for(use(), 10))


def test_the_last_use_never_goes_backwards_and_whoever_holds_a_key_is_not_waited_for(database_url: str) -> None:
    first, second = (make_key(database_url, tenant="own", name=name) for name in ("first", "second"))

    async def write(ages: dict[str, float]) -> list[str]:
        engine = make_engine(database_url, pool_size=1, application_name="test")
        try:
            async with engine.connect() as connection:
                return sorted(await keys.note_used(connection, ages))
        finally:
            await engine.dispose()

    assert asyncio.run(write({id_of(first): 10.0})) == []
    asyncio.run(write({id_of(first): 100.0}))
    ago = last_used(database_url, first)
    assert ago is not None
    assert ago < 20
    with psycopg.connect(database_url) as busy:
        busy.execute("SELECT FROM api_keys WHERE id = %s FOR NO KEY UPDATE", [id_of(first)])
        assert asyncio.run(asyncio.wait_for(write({id_of(first): 1.0, id_of(second): 1.0}), 5)) == [id_of(first)]
    assert last_used(database_url, second) is not None


def test_a_database_that_does_not_answer_makes_last_uses_late_and_nothing_else(
    database_url: str, owner_url: str
) -> None:
    key = make_key(database_url, tenant="own", name="test")

    async def use() -> None:
        engine = make_engine(database_url, pool_size=1, application_name="test")
        usage = KeyUsage(engine, every_s=0.05)
        async with usage.running():
            with psycopg.connect(owner_url) as busy:
                busy.execute("LOCK TABLE api_keys")
                usage.note(id_of(key))
                await asyncio.sleep(2.0)
            with psycopg.connect(owner_url, autocommit=True) as owner:
                owner.execute("ALTER TABLE api_keys RENAME TO away")
                await asyncio.sleep(0.2)
                owner.execute("ALTER TABLE away RENAME TO api_keys")
            while last_used(database_url, key) is None:
                await asyncio.sleep(0.05)
        await engine.dispose()

    asyncio.run(asyncio.wait_for(use(), 20))
    ago = last_used(database_url, key)
    assert ago is not None
    assert ago > 2


def test_a_use_while_the_database_is_being_told_is_told_as_well(database_url: str, owner_url: str) -> None:
    key = make_key(database_url, tenant="own", name="test")

    async def use() -> float:
        engine = make_engine(database_url, pool_size=1, application_name="test")
        usage = KeyUsage(engine, every_s=0.05)
        async with usage.running():
            with psycopg.connect(owner_url) as busy:
                busy.execute("LOCK TABLE api_keys")
                usage.note(id_of(key))
                await asyncio.sleep(0.6)
                usage.note(id_of(key))
                noted = time.monotonic()
            await asyncio.sleep(0.1)
        await engine.dispose()
        return time.monotonic() - noted

    since = asyncio.run(use())
    ago = last_used(database_url, key)
    assert ago is not None
    assert ago < since + 0.3


def test_the_use_of_a_key_that_somebody_holds_is_written_later(database_url: str) -> None:
    key = make_key(database_url, tenant="own", name="test")

    async def use() -> None:
        engine = make_engine(database_url, pool_size=1, application_name="test")
        usage = KeyUsage(engine, every_s=0.05)
        async with usage.running():
            with psycopg.connect(database_url) as busy:
                busy.execute("SELECT FROM api_keys WHERE id = %s FOR NO KEY UPDATE", [id_of(key)])
                usage.note(id_of(key))
                await asyncio.sleep(0.3)
                assert last_used(database_url, key) is None
        await engine.dispose()

    asyncio.run(use())
    assert last_used(database_url, key) is not None


def test_of_more_keys_than_can_be_remembered_the_others_are_forgotten(database_url: str) -> None:
    known, forgotten = (make_key(database_url, tenant="own", name=name) for name in ("known", "forgotten"))

    async def use() -> None:
        engine = make_engine(database_url, pool_size=1, application_name="test")
        usage = KeyUsage(engine)
        async with usage.running():
            for key_id in (id_of(known), *map(str, range(MAX_KEYS - 1)), id_of(forgotten), id_of(known)):
                usage.note(key_id)
        await engine.dispose()

    asyncio.run(use())
    assert last_used(database_url, known) is not None
    assert last_used(database_url, forgotten) is None


# -- nothing secret is told


def test_no_log_and_no_answer_holds_a_secret_whatever_becomes_of_the_key(
    start_api: StartApi, database_url: str, tmp_path: Path
) -> None:
    key = make_key(database_url, tenant="own", name="test")
    secret = key.split("_", 2)[2][:-1]
    for address, status in ((database_url, 200), (f"{database_url}-gone", 503)):
        api = start_api(DATABASE_URL=address)
        assert asked_with(api.address, f"Bearer {key}").status_code == status
        for presented in (f"Bearer {key}x", f"Bearer {key[:-1]}", f"Basic {key}", key, f"bearer  {key}"):
            answer = asked_with(api.address, presented)
            assert secret not in answer.text + str(answer.headers)
        assert secret not in (tmp_path / "api.log").read_text()
