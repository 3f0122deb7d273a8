"""Verifying 200,000 events with the command: online, from the database, and offline, from an export."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.audit.keys import load_private_key, new_private_key_pem, public_key_pem
from app.audit.proof import Checkpoint, Leaf, make_checkpoint
from app.db.migrate import upgrade
from app.devstack.stack import Stack

RUNS = 20_000
EVENTS = RUNS * 10
CHECKPOINTS = 20
GOAL = "≥ 50000"

Row = tuple[str, str, str]


def measure_verifying(stack: Stack) -> list[Row]:
    """Rows: what, figure, goal."""
    database_url = stack.postgres.create_database("bench_verifying")
    upgrade(database_url)
    private = new_private_key_pem()
    public_key, anchor, export = (stack.directory / name for name in ("verify.pem", "verify.jsonl", "audit.jsonl"))
    public_key.write_text(public_key_pem(private))
    fill_audit(database_url)
    seal_audit(database_url, anchor, load_private_key(private))
    env = {**stack.env, "DATABASE_URL": database_url, "AUDIT_SIGNING_KEY": private, "AUDIT_ANCHOR": str(anchor)}

    def audit(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "app", "audit", *words]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        return dict(json.loads(done.stdout)) if "--json" in words else {}

    online = audit("verify", "--json")
    with_payloads = audit("verify", "--payloads", "--json")
    audit("export", str(export))
    offline = audit("verify", "--export", str(export), "--public-key", str(public_key), "--json")
    what = f"{EVENTS} audit events: verified"
    return [
        (f"{what} online, a second", _speed(online), GOAL),
        (f"{what} online with payloads, a second", _speed(with_payloads), ""),
        (f"{what} offline, a second", _speed(offline), GOAL),
        ("an export of them, MB", f"{export.stat().st_size / 1e6:.0f}", ""),
    ]


def _speed(report: dict[str, Any]) -> str:
    assert report["holds"], report["findings"]
    assert report["events"] == EVENTS
    return f"{report['events'] / report['seconds']:.0f}"


def fill_audit(database_url: str) -> None:
    """Runs of three tool calls that have ended, with all their events."""
    versions = {"agent": "bench", "agent_version": "1f3c", "prompt_sha256": "ab" * 32, "prices_sha256": "cd" * 32}
    model = {**versions, "model": "gpt-5-mini", "tools": ["look_up"], "input_tokens": 900, "output_tokens": 40}
    tool = {"tool": "look_up", "effect": "read", "state": "succeeded", "idempotency_key": "ef" * 16}
    said = json.dumps({"content": None, "tool_calls": [{"tool": "look_up", "arguments": "x" * 80}]})
    answered = json.dumps({"arguments": {"text": "x" * 60}, "result": "y" * 200})
    events: list[dict[str, Any]] = [
        {"kind": "run.accepted", "data": versions, "payload": json.dumps({"input": "x" * 200, "metadata": {}})},
        {"kind": "run.claimed", "data": {"attempt": 1, "image_digest": ""}},
    ]
    for step in range(0, 6, 2):
        events.append({"kind": "model.replied", "data": {**model, "step": step}, "payload": said})
        events.append({"kind": "tool.answered", "data": {**tool, "step": step + 1}, "payload": answered})
    events.append({"kind": "model.replied", "data": {**model, "step": 6}, "payload": said})
    events.append({"kind": "run.succeeded", "data": {"stop_reason": "final_answer"}, "payload": said})
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            """
            INSERT INTO runs (id, tenant, api_key_id, request_id, agent, agent_version, input, metadata, limits,
                              priority, request_hash, status, stop_reason, ended_at)
            SELECT (lpad(to_hex(1700000000000 + number), 12, '0') || '70008' || lpad(to_hex(number), 15, '0'))::uuid,
                   'bench', 'k', 'r', 'bench', '1', '{}', '{}', '{}', 0, '', 'succeeded', 'final_answer', now()
            FROM generate_series(1, %s) AS number
            """,
            [RUNS],
        )
        connection.execute("SELECT append_audit(id, tenant, 'worker:bench', %s) FROM runs", [json.dumps(events)])
        connection.execute("VACUUM ANALYZE")


def seal_audit(database_url: str, anchor: Path, key: Ed25519PrivateKey) -> None:
    """All heads in checkpoints of equal size."""
    previous: Checkpoint | None = None
    with psycopg.connect(database_url, autocommit=True) as connection, anchor.open("w") as file:
        for _ in range(CHECKPOINTS):
            statement = "SELECT run_id, seq, hash FROM audit_heads WHERE NOT is_sealed ORDER BY run_id LIMIT %s"
            leaves = [Leaf(*row) for row in connection.execute(statement, [RUNS // CHECKPOINTS])]
            previous = make_checkpoint(leaves, previous=previous, at=datetime.now(UTC), key=key)
            columns = [list(column) for column in zip(*leaves, strict=True)]
            row = [previous.number, previous.body, previous.signature, *columns]
            connection.execute("SELECT seal_audit(%s, %s, %s, %s, %s, %s)", row)
            connection.execute("SELECT mark_sealed(%s, %s)", [previous.number, columns[0]])
            connection.execute("SELECT mark_sealed(%s, %s)", [previous.number, columns[0]])
            connection.execute("SELECT note_anchored(%s)", [previous.number])
            file.write(previous.line)
