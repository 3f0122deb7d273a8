"""`agent-service keys`: what it prints where, its exit codes, and what a key may do afterwards."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import click.testing
import psycopg
import pytest
from click.testing import CliRunner
from psycopg.rows import dict_row

import app.cli
from app.cli.keys import MAX_BURST, MAX_IN_FLIGHT
from app.devstack.access import id_of, is_accepted, make_key, replace_key
from app.domain.principal import Scope
from tests.stack import Stack, clean_env

Keys = Callable[..., click.testing.Result]
TILL = ("create", "--tenant", "shop", "--name", "till 1")
PRINTED = r"ask_[0-9a-f]{12}_[\w-]{43}\n"


@pytest.fixture
def keys(database_url: str, redis_url: str) -> Keys:
    """Runs `agent-service keys` in this process, on a migrated database of this test's own."""
    runner = CliRunner(env={"DATABASE_URL": database_url, "REDIS_URL": redis_url})
    return lambda *arguments: runner.invoke(app.cli.cli, ["keys", *arguments], prog_name="agent-service")


def made(keys: Keys, *options: str) -> str:
    result = keys(*TILL, *options)
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()


def rotated(keys: Keys, key: str, *options: str) -> str:
    result = keys("rotate", id_of(key), *options)
    assert result.exit_code == 0, result.stderr
    assert re.fullmatch(PRINTED, result.stdout)
    return result.stdout.strip()


def stored(database_url: str, key: str) -> dict[str, Any]:
    with psycopg.connect(database_url, row_factory=dict_row) as connection:
        row = connection.execute("SELECT * FROM api_keys WHERE id = %s", [id_of(key)]).fetchone()
    assert row is not None
    return row


def limits_of(database_url: str, key: str) -> tuple[float, int, int]:
    row = stored(database_url, key)
    return row["requests_per_s"], row["burst"], row["max_in_flight"]


def listed(keys: Keys) -> list[dict[str, str]]:
    titles, *rows = [re.split(r"  +", line) for line in keys("list").stdout.splitlines()]
    assert titles == ["ID", "TENANT", "NAME", "SCOPES", "LIMITS", "CREATED", "LAST USED", "STATE"]
    return [dict(zip(titles, row, strict=True)) for row in rows]


def refused(result: click.testing.Result, message: str) -> None:
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"agent-service: {message}\n")


# -- create


def test_a_key_is_printed_alone_on_standard_output_and_works(keys: Keys, database_url: str) -> None:
    result = keys(*TILL)
    assert result.exit_code == 0
    assert re.fullmatch(PRINTED, result.stdout)
    assert is_accepted(database_url, result.stdout.strip())


def test_a_key_has_the_limits_that_it_is_given(keys: Keys, database_url: str) -> None:
    assert limits_of(database_url, made(keys)) == (100, 200, 1000)
    given = made(keys, "--rate", "2.5", "--burst", "7", "--max-in-flight", "3")
    assert limits_of(database_url, given) == (2.5, 7, 3)
    most = made(keys, "--rate", "10000", "--burst", str(MAX_BURST), "--max-in-flight", str(MAX_IN_FLIGHT))
    assert limits_of(database_url, most) == (10_000, MAX_BURST, MAX_IN_FLIGHT)


@pytest.mark.parametrize(
    "options",
    [
        ("--name", "till"),
        ("--tenant", "shop"),
        ("--tenant", " ", "--name", "till"),
        ("--tenant", "shop", "--name", "till\n2"),
        (*TILL[1:], "--scope", "runs:delete"),
        *((*TILL[1:], "--expires-in", text) for text in ("90", "0d", "-1d", "1w", "1e3d", "")),
        *((*TILL[1:], "--rate", text) for text in ("0", "-1", "nan", "inf", "1e9", "0.001", "fast", "")),
        *((*TILL[1:], "--burst", text) for text in ("0", "-1", "1.5", "100001", "")),
        *((*TILL[1:], "--max-in-flight", text) for text in ("0", "-1", "1000001", "many")),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(options: tuple[str, ...]) -> None:
    result = CliRunner(env=clean_env()).invoke(app.cli.cli, ["keys", "create", *options])
    assert result.exit_code == 2
    assert "Error: " in result.stderr


# -- list


def test_the_list_shows_keys_but_no_secret(keys: Keys) -> None:
    first = made(keys)
    second = keys("create", "--tenant", "bank", "--name", "desk", "--scope", "admin", "--expires-in", "90d").stdout
    in_90_days = datetime.now(UTC) + timedelta(days=90)
    till, desk = listed(keys)
    assert till == {
        "ID": id_of(first),
        "TENANT": "shop",
        "NAME": "till 1",
        "SCOPES": "runs:read,runs:write",
        "LIMITS": "100/s 200 1000",
        "CREATED": f"{datetime.now(UTC):%Y-%m-%d}",
        "LAST USED": "never",
        "STATE": "valid",
    }
    assert (desk["ID"], desk["TENANT"], desk["SCOPES"]) == (id_of(second), "bank", "admin")
    assert desk["STATE"].startswith(f"valid until {in_90_days:%Y-%m-%d}")
    printed = keys("list").stdout
    assert first.split("_", 2)[2] not in printed
    assert max(map(len, printed.splitlines())) < 150


def test_the_list_shows_when_a_key_was_last_used_and_what_became_of_it(keys: Keys, database_url: str) -> None:
    used, expired, revoked, old, gone = (made(keys) for _ in range(5))
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE api_keys SET last_used_at = '2026-07-21 09:30Z' WHERE id = %s", [id_of(used)])
        connection.execute("UPDATE api_keys SET expires_at = now() WHERE id = %s", [id_of(expired)])
    keys("revoke", id_of(revoked))
    replacing, instead = rotated(keys, old), rotated(keys, gone, "--overlap", "0s")
    until = f"{stored(database_url, old)['expires_at'].astimezone(UTC):%Y-%m-%d %H:%MZ}"
    states = {row["ID"]: row["STATE"] for row in listed(keys)}
    assert states == {
        id_of(used): "valid",
        id_of(expired): "expired",
        id_of(revoked): "revoked",
        id_of(old): f"replaced, good until {until}",
        id_of(gone): "replaced",
        id_of(replacing): "valid",
        id_of(instead): "valid",
    }
    assert [row["LAST USED"] for row in listed(keys)] == ["2026-07-21 09:30Z", *["never"] * 6]


# -- revoke


def test_a_revoked_key_is_refused_and_cannot_be_revoked_twice(keys: Keys, database_url: str) -> None:
    key = made(keys)
    assert keys("revoke", id_of(key)).exit_code == 0
    assert not is_accepted(database_url, key)
    refused(keys("revoke", id_of(key)), f"there is no key {id_of(key)!r} that is not revoked already")
    assert stored(database_url, key)["revoked_at"]


# -- rotate


def test_a_rotated_key_is_as_good_as_the_old_one_and_both_are_for_the_overlap(keys: Keys, database_url: str) -> None:
    old = keys(
        *("create", "--tenant", "shop", "--name", "till 1", "--scope", "reviews:read", "--scope", "audit:read"),
        *("--rate", "3", "--burst", "4", "--max-in-flight", "5", "--expires-in", "90d"),
    ).stdout.strip()
    before = stored(database_url, old)
    result = keys("rotate", id_of(old))
    new = result.stdout.strip()
    was, is_now = stored(database_url, old), stored(database_url, new)
    same = ("tenant", "name", "scopes", "requests_per_s", "burst", "max_in_flight")
    assert [is_now[name] for name in same] == [before[name] for name in same]
    assert is_now["holder"] == was["holder"] == id_of(old)
    assert is_now["expires_at"] == before["expires_at"]
    assert (was["replaced_by"], is_now["replaced_by"]) == (id_of(new), None)
    assert timedelta(hours=23.9) < was["expires_at"] - datetime.now(UTC) < timedelta(hours=24.1)
    assert f"Key {id_of(old)} is good until {was['expires_at'].astimezone(UTC):%Y-%m-%d %H:%MZ}." in result.stderr
    assert is_accepted(database_url, old)
    assert is_accepted(database_url, new)
    assert old.split("_", 2)[2] != new.split("_", 2)[2]


def test_a_key_that_does_not_expire_is_replaced_by_one_that_does_not_either(keys: Keys, database_url: str) -> None:
    assert stored(database_url, rotated(keys, made(keys)))["expires_at"] is None


def test_the_new_key_may_be_given_another_expiry(keys: Keys, database_url: str) -> None:
    new = rotated(keys, made(keys, "--expires-in", "1d"), "--expires-in", "30d")
    assert timedelta(days=29) < stored(database_url, new)["expires_at"] - datetime.now(UTC) < timedelta(days=31)


def test_a_rotated_key_is_never_good_for_longer_than_it_was(keys: Keys, database_url: str) -> None:
    old = made(keys, "--expires-in", "30m")
    before = stored(database_url, old)["expires_at"]
    rotated(keys, old, "--overlap", "48h")
    assert stored(database_url, old)["expires_at"] == before


def test_without_an_overlap_the_old_key_is_refused_at_once(keys: Keys, database_url: str) -> None:
    old = made(keys)
    result = keys("rotate", id_of(old), "--overlap", "0s")
    assert f"Key {id_of(old)} is refused from now on.\n" in result.stderr
    assert not is_accepted(database_url, old)
    assert is_accepted(database_url, result.stdout.strip())


def test_a_key_is_replaced_once_and_the_new_one_again(keys: Keys, database_url: str) -> None:
    first = made(keys)
    second = rotated(keys, first)
    refused(keys("rotate", id_of(first)), f"key {id_of(first)} was replaced before: rotate {id_of(second)}")
    third = rotated(keys, second)
    assert stored(database_url, third)["holder"] == id_of(first)
    assert len(listed(keys)) == 3


def test_of_two_rotations_at_once_one_is_told_that_the_other_was_first(database_url: str) -> None:
    key = make_key(database_url, tenant="shop", name="till")

    def rotate(_: int) -> bool:
        try:
            replace_key(database_url, key)
        except AssertionError:
            return False
        return True

    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(6) as threads, psycopg.connect(database_url, autocommit=True) as look:
        with psycopg.connect(database_url) as busy:
            busy.execute("SELECT FROM api_keys FOR UPDATE")
            rotations = [threads.submit(rotate, number) for number in range(6)]
            Stack.until(lambda: look.execute(waiting).fetchone() == (6,))
        assert sorted(rotation.result() for rotation in rotations) == [False] * 5 + [True]
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM api_keys").fetchone() == (2,)


def test_a_key_that_is_not_good_any_more_is_not_rotated(keys: Keys, database_url: str) -> None:
    revoked, expired = made(keys), made(keys)
    keys("revoke", id_of(revoked))
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE api_keys SET expires_at = now() WHERE id = %s", [id_of(expired)])
    make_one = "make a new one with `agent-service keys create`"
    refused(keys("rotate", id_of(revoked)), f"key {id_of(revoked)} was revoked: {make_one}")
    refused(keys("rotate", id_of(expired)), f"key {id_of(expired)} has expired: {make_one}")
    refused(keys("rotate", "nobody"), "there is no key 'nobody'")
    assert len(listed(keys)) == 2


@pytest.mark.parametrize("overlap", ["0", "-1h", "24", "1w", "", "0h"])
def test_an_overlap_that_makes_no_sense_changes_nothing(keys: Keys, overlap: str) -> None:
    key = made(keys)
    result = keys("rotate", id_of(key), "--overlap", overlap)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--overlap" in result.stderr
    assert len(listed(keys)) == 1


# -- limit


def test_limits_are_changed_one_by_one_or_together(keys: Keys, database_url: str) -> None:
    key, other = made(keys), made(keys)
    result = keys("limit", id_of(key), "--rate", "5")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"Changed for {id_of(key)}.\n")
    assert limits_of(database_url, key) == (5, 200, 1000)
    assert keys("limit", id_of(key), "--burst", "6", "--max-in-flight", "7").exit_code == 0
    assert limits_of(database_url, key) == (5, 6, 7)
    assert limits_of(database_url, other) == (100, 200, 1000)


def test_the_keys_of_one_holder_have_the_same_limits(keys: Keys, database_url: str) -> None:
    old = made(keys)
    new = rotated(keys, old)
    for key, rate in ((old, 5), (new, 6)):
        result = keys("limit", id_of(key), "--rate", str(rate))
        assert result.stderr == f"Changed for {' and '.join(sorted([id_of(old), id_of(new)]))}.\n"
        assert limits_of(database_url, old) == limits_of(database_url, new) == (rate, 200, 1000)


def test_limits_of_a_key_that_is_not_good_are_not_changed(keys: Keys, database_url: str) -> None:
    key = made(keys)
    keys("revoke", id_of(key))
    refused(keys("limit", id_of(key), "--rate", "5"), f"there is no valid key {id_of(key)!r}")
    refused(keys("limit", "nobody", "--rate", "5"), "there is no valid key 'nobody'")
    assert limits_of(database_url, key) == (100, 200, 1000)


@pytest.mark.parametrize("options", [(), ("--rate", "nan"), ("--burst", "0"), ("--max-in-flight", "-1")])
def test_limits_that_make_no_sense_are_not_set(keys: Keys, options: tuple[str, ...]) -> None:
    result = keys("limit", "some", *options)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def test_every_scope_can_be_given(keys: Keys) -> None:
    key = made(keys, *(word for scope in Scope for word in ("--scope", scope.value)))
    (row,) = listed(keys)
    assert (row["ID"], set(row["SCOPES"].split(","))) == (id_of(key), set(Scope))
