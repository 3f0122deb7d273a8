"""Brings the database's schema to a revision."""

from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from psycopg import sql

from app.domain.errors import ConfigurationError

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"

ROLE = "agent_service"
"""Made by a migration: what the service may do in the database."""


def alembic_config(database_url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["database_url"] = database_url
    return config


def upgrade(database_url: str, revision: str = "head") -> None:
    """Upgrade; safe to call from several processes at once, the later ones find nothing to do."""
    command.upgrade(alembic_config(database_url), revision)


def admit(owner_url: str, user: str) -> None:
    """Give a database user the rights of the service.

    Raises `ConfigurationError` where there is no such user, or the owner may not say who is a member of the role.
    """
    with psycopg.connect(owner_url, autocommit=True) as connection:
        try:
            connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(ROLE), sql.Identifier(user)))
        except psycopg.errors.UndefinedObject:
            raise ConfigurationError(
                f"DATABASE_URL: the database has no user {user!r}: CREATE ROLE {user} LOGIN PASSWORD '…'"
            ) from None
        except psycopg.errors.InsufficientPrivilege:
            raise ConfigurationError(
                f"OWNER_DATABASE_URL: this user may not do it, an administrator can: GRANT {ROLE} TO {user}"
            ) from None


def downgrade(database_url: str, revision: str) -> None:
    command.downgrade(alembic_config(database_url), revision)
