"""How Alembic runs here: one migrator at a time, and no migration waits for a lock, or runs, longer than it may."""

from alembic import context
from sqlalchemy import create_engine, pool, text

from app.db.engine import driver_url
from app.db.tables import metadata

LOCK_TIMEOUT = "5s"
STATEMENT_TIMEOUT = "60s"
MIGRATION_LOCK = 7_261_402_118
"""Key of the advisory lock that keeps a second migrator waiting until the first is done."""


def migrate() -> None:
    engine = create_engine(driver_url(context.config.attributes["database_url"]), poolclass=pool.NullPool)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
        connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
        connection.execute(text(f"SET statement_timeout = '{STATEMENT_TIMEOUT}'"))
        connection.commit()
        context.configure(
            connection=connection, target_metadata=metadata, compare_server_default=True, transaction_per_migration=True
        )
        with context.begin_transaction():
            context.run_migrations()


migrate()
