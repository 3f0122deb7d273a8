"""Whoever changes the audit is seen, and by which check; what is not seen is said."""

import hashlib
import json
import re
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest

from app.audit.offline import read_checkpoints
from app.audit.proof import Leaf, merkle_root, payload_hash
from app.audit.report import MOST, Check
from app.audit.verifier import GRACE, Anchored, verify
from app.db.audit_log import open_audit_log
from app.devstack.ports import free_port
from tests.audit.evidence import Evidence, Json
from tests.audit.tampering import ATTEMPTS, EDIT, RESTORE, Attempt, table
from tests.stack import Stack

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "audit.md"


def checks(report: Json) -> set[str]:
    return {finding["check"] for finding in report["findings"]}


def test_what_nobody_has_touched_holds(evidence: Evidence) -> None:
    report = evidence.verify()
    assert report["findings"] == []
    assert (report["runs"], report["checkpoints"], report["unanchored"]) == (len(evidence.runs), 2, 0)
    assert report["unsealed"] == len(evidence.events("not sealed")) + 1  # a read of a run that was sealed before
    assert report["payloads"] == sum(
        event.payload_sha256 is not None for run in evidence.runs for event in evidence.events(run)
    )
    assert report["warnings"] == []


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.what)
def test_an_attempt_is_seen_by(evidence: Evidence, attempt: Attempt) -> None:
    attempt.do(evidence)
    report = evidence.verify()
    assert checks(report) == set(attempt.seen), report["findings"]


def test_a_restored_backup_is_seen(original: Evidence, evidence: Evidence, servers: Stack) -> None:
    name, backup = evidence.owner_url.rpartition("/")[2], f"backup_{uuid4().hex}"
    servers.postgres.create_database(backup, template=name)
    evidence.seal()
    assert evidence.verify()["holds"]
    servers.postgres.drop_database(name)
    servers.postgres.create_database(name, template=backup)
    servers.postgres.drop_database(backup)
    report = evidence.verify()
    assert checks(report) == set(RESTORE.seen)
    [finding] = report["findings"]
    assert finding["subject"] == "checkpoint 3"
    assert "old backup" in finding["sentence"]


def test_the_documentation_has_this_table() -> None:
    lines = DOCUMENTATION.read_text().splitlines()
    begin = lines.index("| attempt | seen by |")
    end = lines.index("", begin)
    assert lines[begin:end] == table()


def test_the_documentation_explains_every_check_and_its_example_is_right() -> None:
    text = DOCUMENTATION.read_text()
    for check in Check:
        assert re.search(rf"^\| `{check}` \| ", text, re.MULTILINE), check
    [event] = re.findall(r"```json\n(.*)\n```", text)
    salted, hashed, root = re.findall(r"`([0-9a-f]{64})`", text)
    assert payload_hash(bytes(32), '{"input":"hello"}').hex() == salted == json.loads(event)["payload_sha256"]
    assert hashlib.sha256(event.encode()).hexdigest() == hashed
    assert merkle_root([Leaf(UUID(json.loads(event)["run_id"]), 1, bytes.fromhex(hashed))]).hex() == root


def test_a_finding_names_the_run_and_the_event(evidence: Evidence) -> None:
    with evidence.connect() as connection:
        connection.execute(EDIT, [evidence.runs["alike"]])
    [finding] = evidence.verify()["findings"]
    assert finding["subject"] == str(evidence.runs["alike"])
    assert finding["sentence"].startswith("event 3 (")


def test_events_that_wait_too_long_for_a_checkpoint_are_a_finding(evidence: Evidence) -> None:
    def at(later: timedelta) -> set[str]:
        with open_audit_log(evidence.database_url) as log:
            log.at += later
            report = verify(log, [evidence.key.public_key()], expected=None, anchored=None)
            return {finding.check for finding in report.findings}

    assert at(timedelta(0)) == set()
    assert at(GRACE) == {"unsealed"}


def test_a_checkpoint_that_is_not_anchored_is_a_finding_after_a_while(evidence: Evidence) -> None:
    with evidence.connect() as connection:
        connection.execute("UPDATE audit_checkpoints SET anchored_at = NULL WHERE number = 2")
    first, _ = evidence.anchor.read_text().splitlines(keepends=True)
    evidence.anchor.write_text(first)
    report = evidence.verify()
    assert (report["holds"], report["unanchored"]) == (True, 1)
    with open_audit_log(evidence.database_url) as log:
        log.at += GRACE
        later = verify(log, [], expected=None, anchored=Anchored(read_checkpoints(evidence.anchor)))
    assert [finding.subject for finding in later.findings if finding.check is Check.ANCHOR] == ["checkpoint 2"]


def test_many_findings_are_counted_and_the_first_are_listed(evidence: Evidence) -> None:
    with evidence.connect() as connection:
        connection.execute("""
            INSERT INTO audit_events (run_id, seq, tenant, at, actor, kind, data, hash)
            SELECT gen_random_uuid(), 1, 't', now(), 'a', 'run.accepted', '{}', '' FROM generate_series(1, 1000)
        """)
    report = evidence.verify()
    assert (len(report["findings"]), report["found"]) == (MOST, 3000)  # chain, head, run
    assert "2,900 more" in evidence.audit("verify").stdout


def test_odd_values_are_findings_and_not_failures(evidence: Evidence) -> None:
    with evidence.connect() as connection:
        connection.execute("UPDATE audit_leaves SET seq = -1 WHERE run_id = %s", [evidence.runs["alike"]])
        connection.execute("UPDATE audit_checkpoints SET body = 'not JSON', signature = '' WHERE number = 1")
        connection.execute("UPDATE audit_checkpoints SET body = '[]' WHERE number = 2")
        connection.execute(
            "UPDATE audit_events SET at = 'infinity', hash = '' WHERE run_id = %s", [evidence.runs["failed"]]
        )
        connection.execute("UPDATE audit_payloads SET salt = '' WHERE run_id = %s", [evidence.runs["waiting"]])
    found = checks(evidence.verify())
    assert {"chain", "leaf", "root", "sequence", "signature", "anchor", "payload"} <= found


def test_a_line_for_people(evidence: Evidence) -> None:
    result = evidence.audit("verify")
    assert result.exit_code == 0
    assert "Everything that was checked holds." in result.stdout
    assert "Not checked: whether payloads are what was hashed (--payloads)." in result.stdout


def test_who_could_change_the_audit_is_warned_of(evidence: Evidence) -> None:
    result = evidence.audit("verify", DATABASE_URL=evidence.owner_url)
    assert result.exit_code == 0
    assert "warning: the database user postgres is a superuser" in result.stdout
    role = evidence.database_url.partition("//")[2].partition(":")[0]
    with psycopg.connect(evidence.owner_url) as connection:
        connection.execute(f"GRANT DELETE ON audit_payloads TO {role}")
    [warning] = evidence.verify()["warnings"]
    assert warning.endswith(f"{role} could change the audit: audit_payloads (DELETE)")


def test_another_public_key_does_not_verify(evidence: Evidence, tmp_path: Path) -> None:
    other = evidence.audit("keygen").stderr
    (tmp_path / "other.pem").write_text(other)
    report = evidence.verify("--public-key", str(tmp_path / "other.pem"))
    assert checks(report) == {"signature"}
    assert evidence.verify(
        "--public-key", str(tmp_path / "other.pem"), "--public-key", str(tmp_path / "audit-public-key.pem")
    )["holds"]


def test_without_a_key_checkpoints_are_not_taken_on_trust(evidence: Evidence) -> None:
    result = evidence.audit("verify", AUDIT_ANCHOR=str(evidence.anchor.parent / "elsewhere" / "anchor.jsonl"))
    assert result.exit_code == 2
    assert "give --public-key" in result.stderr


def test_a_key_that_is_none_is_told_without_showing_it(evidence: Evidence, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("hunter2")
    result = evidence.audit("verify", "--public-key", str(tmp_path / "bad.pem"))
    assert result.exit_code == 2
    assert "is not an Ed25519 public key" in result.stderr
    assert "hunter2" not in result.output


def test_runs_before_a_given_one_are_left_out(evidence: Evidence) -> None:
    with evidence.connect() as connection:
        connection.execute(EDIT, [evidence.runs["succeeded"]])
    assert not evidence.verify()["holds"]
    report = evidence.verify("--since-run", str(evidence.runs["failed"]))
    assert (report["holds"], report["runs"]) == (True, 4)


def test_a_database_that_is_away_is_one_line(evidence: Evidence, tmp_path: Path) -> None:
    away = f"postgresql://agent:hunter2@127.0.0.1:{free_port()}/agents"
    for words in (
        ("verify",),
        ("export", str(tmp_path / "audit.jsonl")),
        ("erase", "--reason", "x", "--run", str(uuid4())),
    ):
        result = evidence.audit(*words, DATABASE_URL=away, OWNER_DATABASE_URL=away)
        assert result.exit_code == 1
        assert re.fullmatch(r"agent-service: the database: [^\n]*Connection refused[^\n]*\n", result.stderr), words
        assert "hunter2" not in result.output
