"""Migrations: they agree with the tables, go both ways, and never wait long for a lock or for each other."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, pool
from sqlalchemy.exc import OperationalError

from app.db.engine import driver_url
from app.db.migrate import MIGRATIONS, alembic_config, downgrade, upgrade
from app.db.tables import metadata
from tests.stack import Stack, clean_env


@pytest.fixture
def empty_database(servers: Stack) -> Iterator[str]:
    name = f"empty_{uuid4().hex}"
    yield servers.postgres.create_database(name)
    servers.postgres.drop_database(name)


def differences(database_url: str) -> list[object]:
    """What autogenerate would change to make the database agree with the tables."""
    engine = create_engine(driver_url(database_url), poolclass=pool.NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, metadata))


def objects(database_url: str) -> list[str]:
    """Tables, indexes, constraints and functions that migrations have made."""
    with psycopg.connect(database_url) as connection:
        return [
            name
            for (name,) in connection.execute("""
                SELECT relkind::text || ' ' || relname FROM pg_class WHERE relnamespace = 'public'::regnamespace
                UNION ALL SELECT 'constraint ' || conname FROM pg_constraint WHERE connamespace = 'public'::regnamespace
                UNION ALL SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
                ORDER BY 1
            """)
            if "alembic_version" not in name
        ]


def test_the_migrations_make_what_the_tables_say(owner_url: str) -> None:
    assert differences(owner_url) == []


def test_every_migration_goes_both_ways(empty_database: str) -> None:
    revisions = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()][::-1]
    before = [objects(empty_database)]
    for revision in revisions:
        upgrade(empty_database, revision)
        before.append(objects(empty_database))
    assert before[0] == []
    for revision in reversed(["base", *revisions[:-1]]):
        downgrade(empty_database, revision)
        before.pop()
        assert objects(empty_database) == before[-1]
    upgrade(empty_database)
    assert differences(empty_database) == []


def test_the_history_is_one_line() -> None:
    script = ScriptDirectory(str(MIGRATIONS))
    assert len(script.get_heads()) == 1
    assert not any(revision.is_branch_point or revision.is_merge_point for revision in script.walk_revisions())


def test_two_migrators_at_once_do_it_once(empty_database: str) -> None:
    env = clean_env(DATABASE_URL=empty_database, REDIS_URL="redis://127.0.0.1:1")
    both = [
        subprocess.Popen([sys.executable, "-m", "app", "migrate"], env=env, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=30)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert differences(empty_database) == []


def test_migrations_run_under_timeouts(owner_url: str, tmp_path: Path) -> None:
    head = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    (tmp_path / "9999_look.py").write_text(f"""
from alembic import op

revision, down_revision = "9999", "{head}"


def upgrade() -> None:
    op.execute(
        "CREATE TABLE seen AS"
        " SELECT current_setting('lock_timeout') AS lock, current_setting('statement_timeout') AS statement"
    )
""")
    config = alembic_config(owner_url)
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", f"{MIGRATIONS / 'versions'}\n{tmp_path}")
    command.upgrade(config, "head")
    with psycopg.connect(owner_url) as connection:
        assert connection.execute("SELECT * FROM seen").fetchone() == ("5s", "1min")


def test_a_migration_that_would_wait_for_a_lock_gives_up_and_changes_nothing(owner_url: str) -> None:
    before = objects(owner_url)
    with psycopg.connect(owner_url) as busy:
        busy.execute("LOCK TABLE runs IN ACCESS SHARE MODE")
        began = time.monotonic()
        with pytest.raises(OperationalError, match="lock timeout"):
            downgrade(owner_url, "base")
        assert 4 < time.monotonic() - began < 15
    assert objects(owner_url) == before
    upgrade(owner_url)  # and it does not hold the lock against other migrators
