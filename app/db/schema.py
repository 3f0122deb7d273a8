"""Which revision the database's schema has, and which one this code was written for."""

from pathlib import Path

from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

_VERSIONS = Path(__file__).resolve().parents[2] / "migrations" / "versions"


def newest_revision() -> str:
    """The last migration of this code. Revisions are numbered, so they sort; Alembic is not loaded for it."""
    return max(path.name.partition("_")[0] for path in _VERSIONS.glob("[0-9]*.py"))


_REVISION = text("SELECT version_num FROM alembic_version")


async def current_revision(connection: AsyncConnection) -> str | None:
    """The revision the database is at. None: it was never migrated."""
    try:
        return (await connection.execute(_REVISION)).scalar_one_or_none()
    except ProgrammingError:  # the table does not exist
        return None
