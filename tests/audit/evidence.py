"""Real runs with a sealed audit, and what a test or an attacker does with their database."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import click.testing
import httpx
import psycopg
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import app.cli
from app.anchor import FileAnchor
from app.audit.keys import load_private_key, public_key_pem
from app.audit.proof import Checkpoint, Event, Leaf, event_hash, make_checkpoint
from app.audit.report import Report
from tests.scripts import Reply, Script, rest, submit

Json = dict[str, Any]
Export = Callable[..., Path]
"""Writes an export with these options, and returns its file."""
Check = Callable[[Path], Report]
"""Verifies an export."""


@dataclass(kw_only=True)
class Evidence:
    """A database, its anchor, and the runs in it by what is special about them."""

    database_url: str
    owner_url: str
    anchor: Path
    private_pem: str
    runs: dict[str, UUID] = field(default_factory=dict)

    @property
    def key(self) -> Ed25519PrivateKey:
        return load_private_key(self.private_pem)

    def audit(self, *words: str, input: str | None = None, **env: str) -> click.testing.Result:  # noqa: A002
        """`agent-service audit`, in this process, on this database, with the public half of the key."""
        public_key = self.anchor.with_name("audit-public-key.pem")
        public_key.write_text(public_key_pem(self.private_pem))
        settings = {
            "DATABASE_URL": self.database_url,
            "OWNER_DATABASE_URL": self.owner_url,
            "AUDIT_ANCHOR": str(self.anchor),
            **env,
        }
        return CliRunner(env=settings).invoke(app.cli.cli, ["audit", *words], input, prog_name="agent-service")

    def verify(self, *words: str) -> Json:
        """All checks, payloads too."""
        result = self.audit("verify", "--payloads", "--json", *words)
        assert result.stdout, result.output
        report: Json = json.loads(result.stdout)
        assert result.exit_code == (0 if report["holds"] else 1)
        return report

    def connect(self) -> "psycopg.Connection[Any]":
        """As a superuser for whom no trigger fires."""
        connection = psycopg.connect(self.owner_url, autocommit=True)
        connection.execute("SET session_replication_role = replica")
        return connection

    def seal(self, key: Ed25519PrivateKey | None = None) -> Checkpoint:
        """What the sealer does: all heads that changed, in a checkpoint that is stored and anchored."""
        with psycopg.connect(self.owner_url, autocommit=True) as connection:
            rows = connection.execute("SELECT run_id, seq, hash FROM audit_heads WHERE NOT is_sealed ORDER BY run_id")
            leaves = [Leaf(*row) for row in rows]
            newest = connection.execute("SELECT body, signature FROM audit_checkpoints ORDER BY number DESC").fetchone()
            previous = Checkpoint(*newest) if newest else None
            checkpoint = make_checkpoint(leaves, previous=previous, at=datetime.now(UTC), key=key or self.key)
            columns = [list(column) for column in zip(*leaves, strict=True)] or [[], [], []]
            connection.execute(
                "SELECT seal_audit(%s, %s, %s, %s, %s, %s)",
                [checkpoint.number, checkpoint.body, checkpoint.signature, *columns],
            )
            connection.execute("SELECT mark_sealed(%s, %s)", [checkpoint.number, columns[0]])
            FileAnchor(self.anchor).append(checkpoint)
            connection.execute("SELECT note_anchored(%s)", [checkpoint.number])
        return checkpoint

    def rechain(self, run: str) -> None:
        """Give a run's events, and its head, the hashes that go with what they say now."""
        with self.connect() as connection:
            previous: bytes | None = None
            for event in self.events(run):
                previous = event_hash(event, previous)
                connection.execute(
                    "UPDATE audit_events SET hash = %s WHERE run_id = %s AND seq = %s",
                    [previous, event.run_id, event.seq],
                )
                connection.execute(
                    "UPDATE audit_heads SET seq = %s, hash = %s WHERE run_id = %s", [event.seq, previous, event.run_id]
                )

    def events(self, run: str) -> Sequence[Event]:
        statement = """
            SELECT run_id, seq, at, tenant, actor, kind, data::text, payload_sha256, hash
            FROM audit_events WHERE run_id = %s ORDER BY seq
        """
        with self.connect() as connection:
            return [Event(*row) for row in connection.execute(statement, [self.runs[run]])]

    def rewrite_leaves(self, run: str) -> None:
        """Let the checkpoints have seen the run's events as they are now."""
        with self.connect() as connection:
            connection.execute(
                """
                UPDATE audit_leaves AS leaf SET hash = event.hash FROM audit_events AS event
                WHERE event.run_id = leaf.run_id AND event.seq = leaf.seq AND leaf.run_id = %s
                """,
                [self.runs[run]],
            )

    def sign_again(self, key: Ed25519PrivateKey) -> list[Checkpoint]:
        """Make every checkpoint anew from its leaves as they are now."""
        made: list[Checkpoint] = []
        with self.connect() as connection:
            for (number,) in connection.execute("SELECT number FROM audit_checkpoints ORDER BY number").fetchall():
                leaves = connection.execute(
                    "SELECT run_id, seq, hash FROM audit_leaves WHERE checkpoint = %s", [number]
                )
                previous = made[-1] if made else None
                made.append(
                    make_checkpoint([Leaf(*row) for row in leaves], previous=previous, at=datetime.now(UTC), key=key)
                )
                connection.execute(
                    "UPDATE audit_checkpoints SET body = %s, signature = %s WHERE number = %s",
                    [made[-1].body, made[-1].signature, number],
                )
        return made


def run_to_rest(client: httpx.Client, model_url: str, replies: list[Reply], **more: Any) -> UUID:
    """One run of the agent `toolbox` with what the model replies: until it has ended or waits for a person."""
    run = submit(client, "toolbox", Script(model_url, replies).input, **more)
    return UUID(rest(client, run)["id"])
