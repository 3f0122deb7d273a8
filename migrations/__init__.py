"""Alembic migrations. Every one works with the previous release still running: expand first, contract later."""
