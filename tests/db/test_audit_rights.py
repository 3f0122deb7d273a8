"""Who may do what to the audit in the database, and that SQL hashes it as everybody else does."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import rfc8785
from psycopg import errors, sql
from psycopg.types.json import Jsonb

from app.audit.proof import Event, event_hash, payload_hash
from app.db.audit import audit_parameters
from app.db.migrate import admit, downgrade, upgrade
from app.devstack.processes import Reaper
from app.devstack.servers import Postgres
from app.domain.audit import AuditEntry, AuditKind
from app.domain.canonical import canonical_json
from app.domain.errors import ConfigurationError
from tests.stack import Stack, new_directory

TABLES = ("audit_events", "audit_payloads", "audit_heads", "audit_leaves", "audit_checkpoints")
APPEND = "SELECT append_audit(%s, %s, %s, %s::jsonb)"
CHANGES = {
    "audit_events": "UPDATE audit_events SET actor = 'nobody'",
    "audit_payloads": "UPDATE audit_payloads SET payload = '{}'",
    "audit_heads": "UPDATE audit_heads SET hash = ''",
    "audit_leaves": "UPDATE audit_leaves SET seq = 9",
    "audit_checkpoints": "UPDATE audit_checkpoints SET body = '{}'",
}
INSERTS = {
    "audit_events": "INSERT INTO audit_events SELECT * FROM audit_events",
    "audit_payloads": "INSERT INTO audit_payloads SELECT * FROM audit_payloads",
    "audit_heads": "INSERT INTO audit_heads SELECT gen_random_uuid(), 1, '', false",
    "audit_leaves": "INSERT INTO audit_leaves SELECT 99, gen_random_uuid(), 1, ''",
    "audit_checkpoints": "INSERT INTO audit_checkpoints SELECT 99, '', ''",
}
FUNCTIONS = (
    "append_audit(uuid, text, text, jsonb)",
    "seal_audit(bigint, text, bytea, uuid[], integer[], bytea[])",
    "mark_sealed(bigint, uuid[])",
    "note_anchored(bigint)",
)
Connection = psycopg.Connection[tuple[Any, ...]]


def connect(url: str) -> Connection:
    return psycopg.connect(url, autocommit=True)


def fill(connection: Connection) -> UUID:
    """One row in each of the tables, by the functions."""
    run_id = uuid4()
    entry = AuditEntry(AuditKind.MODEL_REPLIED, {"step": 1}, {"content": "hello"})
    connection.execute(APPEND, [run_id, "t", "w", audit_parameters("w", entry)["events"]])
    connection.execute("SELECT seal_audit(1, 'body', 'signature', %s, %s, %s)", [[run_id], [1], [b"hash"]])
    return run_id


@pytest.fixture
def service(database_url: str) -> Iterator[Connection]:
    """As the service's user."""
    with connect(database_url) as connection:
        fill(connection)
        yield connection


@pytest.fixture(scope="module")
def own_cluster(reaper: Reaper, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A server on which no administrator has prepared anything but a user that may make roles, and its database."""
    with new_directory() as directory:
        postgres = Postgres(directory, reaper=reaper, durable=False)
        try:
            postgres.start()
            with connect(postgres.url()) as connection:
                connection.execute("CREATE ROLE owner LOGIN CREATEROLE PASSWORD 'owner'")
                connection.execute("CREATE ROLE stranger LOGIN PASSWORD 'stranger'")
                connection.execute("CREATE ROLE service LOGIN PASSWORD 'service'")
                connection.execute("CREATE DATABASE owned OWNER owner")
            yield postgres
        finally:
            postgres.stop()


def url_as(postgres: Postgres, user: str, database: str = "owned") -> str:
    return f"postgresql://{user}:{user}@127.0.0.1:{postgres.port}/{database}"


@pytest.fixture(scope="module")
def migrated_by_owner(own_cluster: Postgres) -> Postgres:
    upgrade(url_as(own_cluster, "owner"))
    admit(url_as(own_cluster, "owner"), "service")
    with connect(url_as(own_cluster, "service")) as connection:
        fill(connection)
    return own_cluster


@pytest.mark.parametrize("table", TABLES)
def test_the_services_user_can_read_the_audit_and_change_nothing_in_it(service: Connection, table: str) -> None:
    assert service.execute(f"SELECT FROM {table}").rowcount == 1
    for statement in (
        CHANGES[table],
        INSERTS[table],
        f"DELETE FROM {table}",
        f"TRUNCATE {table}",
        f"DROP TABLE {table}",
        f"ALTER TABLE {table} ADD COLUMN more text",
        f"ALTER TABLE {table} DISABLE TRIGGER ALL",
        f"DROP TRIGGER never_truncated ON {table}",
        f"CREATE TRIGGER mine BEFORE INSERT ON {table} EXECUTE FUNCTION refuse_change()",
        f"DO $$ BEGIN LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE; END $$",
        f"SELECT FROM {table} FOR UPDATE",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            service.execute(statement)
    assert service.execute(f"SELECT FROM {table}").rowcount == 1


def test_the_services_user_cannot_get_the_rights_of_others(service: Connection) -> None:
    service.execute("GRANT UPDATE ON audit_events TO agent_service")  # a warning: nothing was granted
    with pytest.raises(errors.InsufficientPrivilege):
        service.execute(CHANGES["audit_events"])
    for statement in (
        "SET ROLE postgres",
        "ALTER ROLE agent_service SUPERUSER",
        "CREATE FUNCTION public.audit_hash() RETURNS text LANGUAGE sql AS 'SELECT NULL'",
        "SET session_replication_role = replica",
        *(f"DROP FUNCTION {function}" for function in FUNCTIONS),
        *(f"ALTER FUNCTION {function} RESET search_path" for function in FUNCTIONS),
        "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN old; END'",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            service.execute(statement)


def test_what_the_callers_search_path_holds_does_not_get_into_the_functions(service: Connection) -> None:
    service.execute("CREATE TEMP TABLE audit_heads (run_id uuid, seq integer, hash bytea, is_sealed boolean)")
    service.execute("CREATE TEMP TABLE audit_events (LIKE public.audit_events)")
    service.execute("SET search_path = pg_temp, public")
    run_id = uuid4()
    service.execute(APPEND, [run_id, "t", "w", Jsonb([{"kind": "k", "data": "{}"}])])
    assert service.execute("SELECT FROM public.audit_events WHERE run_id = %s", [run_id]).rowcount == 1
    assert service.execute("SELECT FROM pg_temp.audit_events").rowcount == 0


def test_who_is_not_the_service_may_not_even_append(migrated_by_owner: Postgres) -> None:
    with connect(url_as(migrated_by_owner, "stranger")) as stranger:
        for statement, parameters in (
            (APPEND, [uuid4(), "t", "w", Jsonb([{"kind": "k", "data": "{}"}])]),
            ("SELECT seal_audit(9, '', '', '{}', '{}', '{}')", []),
            ("SELECT mark_sealed(1, '{}')", []),
            ("SELECT note_anchored(1)", []),
            ("SELECT FROM audit_events", []),
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                stranger.execute(statement, parameters)


def refused(connection: Connection, statement: str) -> None:
    with pytest.raises(errors.InsufficientPrivilege, match="is refused"):
        connection.execute(statement)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("who", ["owner", "superuser"])
def test_triggers_refuse_what_the_owner_and_a_superuser_try(
    migrated_by_owner: Postgres, service: Connection, owner_url: str, who: str, table: str
) -> None:
    url = owner_url if who == "superuser" else url_as(migrated_by_owner, "owner")
    with connect(url) as connection:
        [(name, is_super)] = connection.execute("SELECT rolname, rolsuper FROM pg_roles WHERE rolname = current_user")
        assert (name, is_super) == (("postgres", True) if who == "superuser" else ("owner", False))
        before = connection.execute(f"SELECT * FROM {table}").fetchall()
        assert before
        refused(connection, CHANGES[table])
        refused(connection, f"DELETE FROM {table}")
        refused(connection, f"TRUNCATE {table}")
        refused(connection, f"TRUNCATE {', '.join(TABLES)} CASCADE")
        assert connection.execute(f"SELECT * FROM {table}").fetchall() == before


def test_a_head_only_goes_forward_and_a_checkpoint_is_anchored_once(service: Connection, owner_url: str) -> None:
    with connect(owner_url) as owner:
        for statement in (
            "UPDATE audit_heads SET seq = seq - 1",
            "UPDATE audit_heads SET hash = 'x', is_sealed = true",
            "UPDATE audit_heads SET run_id = gen_random_uuid()",
            "UPDATE audit_checkpoints SET number = 2",
            "UPDATE audit_checkpoints SET signature = 'x'",
        ):
            refused(owner, statement)
        service.execute("SELECT note_anchored(1)")
        refused(owner, "UPDATE audit_checkpoints SET anchored_at = NULL")
        refused(owner, "UPDATE audit_checkpoints SET anchored_at = now()")
        [before] = owner.execute("SELECT anchored_at FROM audit_checkpoints")
        service.execute("SELECT note_anchored(1)")  # again: nothing happens
        assert list(owner.execute("SELECT anchored_at FROM audit_checkpoints")) == [before]


def test_a_payload_goes_only_in_the_transaction_of_its_event(service: Connection, owner_url: str) -> None:
    [(run_id,)] = service.execute("SELECT run_id FROM audit_heads")
    other = uuid4()
    erased = [run_id, "t", "operator:o", Jsonb([{"kind": "run.erased", "data": "{}"}])]
    service.execute(APPEND, [other, "t", "w", Jsonb([{"kind": "k", "data": "{}", "payload": "1"}])])
    delete = "DELETE FROM audit_payloads WHERE run_id = %s"
    with connect(owner_url) as owner:
        owner.execute(APPEND, erased)
        with pytest.raises(errors.InsufficientPrivilege, match="only in the transaction"):
            owner.execute(delete, [run_id])  # the event came earlier, in a transaction of its own
        with owner.transaction():
            owner.execute(APPEND, erased)
            owner.execute(delete, [run_id])
        with pytest.raises(errors.InsufficientPrivilege, match="only in the transaction"), owner.transaction():
            owner.execute(APPEND, erased)
            owner.execute(delete, [other])
        assert list(owner.execute("SELECT run_id FROM audit_payloads")) == [(other,)]


def test_an_owner_without_a_say_in_the_role_is_told_what_an_administrator_has_to_do(
    migrated_by_owner: Postgres,
) -> None:
    with connect(migrated_by_owner.url()) as administrator:
        administrator.execute("CREATE DATABASE second OWNER stranger")
    second = url_as(migrated_by_owner, "stranger", "second")
    upgrade(second)  # the role is there already, from the first database
    with pytest.raises(ConfigurationError, match="GRANT agent_service TO service"):
        admit(second, "service")
    with pytest.raises(ConfigurationError, match="no user 'nobody'"):
        admit(url_as(migrated_by_owner, "owner"), "nobody")


def chains(connection: Connection) -> dict[UUID, list[Event]]:
    """The events of each run, in order, as a verifier reads them."""
    found: dict[UUID, list[Event]] = {}
    for row in connection.execute("""
        SELECT run_id, seq, at, tenant, actor, kind, data::text, payload_sha256, hash FROM audit_events
        ORDER BY run_id, seq
    """):
        event = Event(*row)
        found.setdefault(event.run_id, []).append(event)
    return found


def holds(connection: Connection) -> bool:
    """Does every chain hold, and every head agree with it?"""
    heads = {
        run_id: (seq, hash_) for run_id, seq, hash_ in connection.execute("SELECT run_id, seq, hash FROM audit_heads")
    }
    all_chains = chains(connection)
    assert heads.keys() == all_chains.keys()
    for run_id, events in all_chains.items():
        previous = None
        for number, event in enumerate(events, start=1):
            if event.seq != number or event.hash != event_hash(event, previous):
                return False
            previous = event.hash
        if heads[run_id] != (len(events), previous):
            return False
    return True


OF_THE_RELEASE_BEFORE: list[Any] = [
    {},
    {"attempt": 1, "image_digest": "", "git_revision": ""},
    {"deadline_s": 300.0, "max_cost_usd": 0.5, "max_steps": 10, "half": 0.25},
    {"metadata": {"z": 1, "a": [True, False, None, {"b": "c", "B": "d"}]}, "": "empty"},
    {"text": 'quotes " and \\ and / and \u2028 and \x7f and \x1f and ü and 🙈'},
    {"numbers": [0, -1, 1.5, 300.0, 1e2, 0.1, 1e-3, -0.0, 123456789.125, 2**53 - 1]},
]


def test_events_of_the_release_before_are_chained_by_the_migration_and_verify(servers: Stack) -> None:
    name = f"before_{uuid4().hex}"
    url = servers.postgres.create_database(name)
    try:
        upgrade(url, "0001")
        with connect(url) as connection:
            for run_id in [uuid4() for _ in range(5)]:
                for data in OF_THE_RELEASE_BEFORE:
                    events = json.dumps([{"kind": "run.claimed", "data": data}, {"kind": "é", "data": data}])
                    connection.execute(APPEND, [run_id, 'a "tenant"', "worker:ü", events])
            before = list(connection.execute("SELECT run_id, seq, tenant, at, actor, kind, data FROM audit_events"))
        upgrade(url)
        with connect(url) as connection:
            assert holds(connection)
            after = connection.execute("SELECT run_id, seq, tenant, at, actor, kind, data FROM audit_events")
            assert sorted(after, key=str) == sorted(before, key=str)
            for events_of_one in chains(connection).values():
                assert [event.data for event in events_of_one[::2]] == [
                    rfc8785.dumps(data).decode() for data in OF_THE_RELEASE_BEFORE
                ]
            assert connection.execute("SELECT FROM audit_heads WHERE is_sealed").rowcount == 0
        downgrade(url, "0001")
        with connect(url) as connection:
            again = connection.execute("SELECT run_id, seq, tenant, at, actor, kind, data FROM audit_events")
            assert sorted(again, key=str) == sorted(before, key=str)
            connection.execute(APPEND, [before[0][0], "t", "w", json.dumps([{"kind": "k", "data": {}}])])
        upgrade(url)
        with connect(url) as connection:
            assert holds(connection)
    finally:
        servers.postgres.drop_database(name)


def test_the_release_before_goes_on_working_on_the_new_schema(service: Connection) -> None:
    """Its workers still run while the new ones start: they send objects, where the new ones send text."""
    run_id = uuid4()
    for data in OF_THE_RELEASE_BEFORE:
        events = json.dumps([{"kind": "run.claimed", "data": data}, {"kind": "run.failed", "data": data}])
        service.execute(APPEND, [run_id, "t", "worker:old", events])
        entry = AuditEntry(AuditKind.MODEL_REPLIED, data, {"said": data})
        service.execute(APPEND, [run_id, "t", "worker:new", audit_parameters("", entry)["events"]])
    claimed = """
        SELECT append_audit(%s, 't', 'worker:old', jsonb_build_array(jsonb_build_object(
            'kind', CAST('run.claimed' AS text), 'data', CAST(%s AS jsonb) || jsonb_build_object('attempt', 3))))
    """
    service.execute(claimed, [run_id, json.dumps({"image_digest": "sha256:1"})])
    assert holds(service)
    assert chains(service)[run_id][-1].data == '{"attempt":3,"image_digest":"sha256:1"}'
    rows = service.execute("""
        SELECT salt, payload, payload_sha256 FROM audit_payloads JOIN audit_events USING (run_id, seq)
    """).fetchall()
    assert len(rows) == len(OF_THE_RELEASE_BEFORE) + 1
    for salt, payload, stored in rows:
        assert len(salt) == 32
        assert payload_hash(salt, payload) == stored
    assert len({salt for salt, _, _ in rows}) == len(rows)


def test_events_keep_the_order_of_their_times_and_come_in_one_transaction_or_not_at_all(service: Connection) -> None:
    run_id = uuid4()
    events = Jsonb([{"kind": f"k{number}", "data": "{}"} for number in range(20)])
    assert service.execute(APPEND, [run_id, "t", "w", events]).fetchone() == (20,)
    with pytest.raises(errors.DivisionByZero):
        service.execute(f"WITH done AS ({APPEND}) SELECT 1 / 0 FROM done", [run_id, "t", "w", events])
    [*chain] = chains(service)[run_id]
    assert [event.kind for event in chain] == [f"k{number}" for number in range(20)]
    assert [event.at for event in chain] == sorted(event.at for event in chain)
    assert holds(service)


ODD = ['"', "\\", "/", "\x01", "\x1f", "\n", "\t", "\b", "\f", "\r", "\x7f", "\x80", "ü", "ß", "🙈", "\u2028", "\u2029"]
ODD += ["\ufeff", "\ufffd", "\ue000", "\U0010ffff", "'", "$$", "{", "}", ":", ",", " ", "a", "Z", "0", "%s", "</"]


def odd_text(random: Random) -> str:
    return "".join(random.choices(ODD, k=random.randrange(12)))


def odd_value(random: Random, depth: int = 3) -> Any:
    """JSON as the service records it: keys of ASCII, integers up to 2^53, decimals of a few digits."""
    kind = random.randrange(8 if depth else 6)
    if kind == 0:
        return random.choice([None, True, False])
    if kind == 1:
        return random.choice([0, 1, -1, 2**53 - 1, 1 - 2**53, random.randrange(10**9)])
    if kind in (2, 3):
        return round(random.uniform(-1000, 1000), random.randrange(1, 6)) * random.choice([1, 1.0, 1000])
    if kind in (4, 5):
        return odd_text(random)
    if kind == 6:
        return [odd_value(random, depth - 1) for _ in range(random.randrange(4))]
    return {odd_key(random): odd_value(random, depth - 1) for _ in range(random.randrange(5))}


def odd_key(random: Random) -> str:
    return "".join(random.choices([text for text in ODD if text.isascii()], k=random.randrange(6)))


def test_sql_writes_json_as_rfc_8785_does(service: Connection) -> None:
    random = Random(1)
    for _ in range(500):
        value = odd_value(random)
        [(written,)] = service.execute("SELECT canonical_json(%s)", [Jsonb(value)])
        assert written == rfc8785.dumps(value).decode(), value


def test_sql_and_the_verifier_hash_an_event_alike(service: Connection) -> None:
    random = Random(2)
    for number in range(400):
        run_id, as_text = uuid4(), bool(number % 2)
        for _ in range(2):
            data = {odd_key(random): odd_value(random) for _ in range(3)}
            payload = canonical_json(odd_value(random)) if random.randrange(2) else None
            entry = {"kind": odd_text(random), "data": canonical_json(data) if as_text else data, "payload": payload}
            events = json.dumps([entry])
            service.execute(APPEND, [run_id, odd_text(random), odd_text(random), events])
    assert holds(service)


def test_text_that_is_recorded_is_hashed_and_kept_to_the_byte(service: Connection) -> None:
    """Also where it is no canonical JSON at all: numbers that no double holds, keys beyond ASCII, spaces."""
    run_id = uuid4()
    texts = ['{"b":1,"a":2}', '{ "n" : 12345678901234567890.10 }', '{"🙈":1,"\ue000":2}', '{"a":1,"a":2}', "[1e400]"]
    for text in texts:
        service.execute(APPEND, [run_id, "t", "w", Jsonb([{"kind": "k", "data": text}])])
    assert [event.data for event in chains(service)[run_id]] == texts
    assert holds(service)


def test_a_zone_of_the_connection_or_a_style_of_dates_changes_no_hash(service: Connection) -> None:
    run_id = uuid4()
    for zone, style in (("Asia/Kathmandu", "German"), ("America/St_Johns", "SQL, DMY"), ("UTC", "ISO")):
        service.execute(sql.SQL("SET timezone = {}").format(sql.Literal(zone)))
        service.execute(sql.SQL("SET datestyle = {}").format(sql.Literal(style)))
        service.execute(APPEND, [run_id, "t", "w", Jsonb([{"kind": "k", "data": "{}"}])])
    service.execute("SET datestyle = 'ISO'")
    assert holds(service)


def test_a_chain_that_was_tampered_with_does_not_hold(service: Connection, owner_url: str) -> None:
    """So that the checks above mean something."""
    assert holds(service)
    with connect(owner_url) as owner:
        owner.execute("ALTER TABLE audit_events DISABLE TRIGGER append_only")
        owner.execute("UPDATE audit_events SET actor = 'x'")
    assert not holds(service)
