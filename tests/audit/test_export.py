"""An export is verified with nothing but the file and a public key, and tells nobody what is not to be told."""

import gzip
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from app.db.audit_log import open_audit_log
from app.db.audit_selection import EVERYTHING
from app.export import AuditWriter
from tests.audit.evidence import Check, Evidence, Export, Json
from tests.audit.tampering import (
    edit_a_payload,
    edit_an_event,
    rewrite_with_the_signing_key,
)

ROOT = Path(__file__).parents[2]


def lines_of(file: Path) -> list[Json]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_export_holds_and_counts_what_the_database_does(evidence: Evidence, export: Export, check: Check) -> None:
    online, offline = evidence.verify(), check(export())
    assert offline.findings == []
    for what in ("events", "runs", "checkpoints", "unsealed", "unsealed_since", "unanchored"):
        assert getattr(offline, what) == online[what], what


def test_a_compressed_export_is_the_same(export: Export, check: Check) -> None:
    compressed = export(name="audit.jsonl.gz")
    assert check(compressed).holds
    assert len(gzip.decompress(compressed.read_bytes()).splitlines()) == len(export().read_text().splitlines())
    assert compressed.stat().st_mode & 0o777 == 0o600


def test_an_export_goes_to_standard_output(evidence: Evidence, tmp_path: Path, check: Check) -> None:
    result = evidence.audit("export", "-")
    (tmp_path / "copy.jsonl").write_text(result.stdout)
    assert check(tmp_path / "copy.jsonl").holds
    assert result.stderr.startswith("Exported 2 checkpoints, ")


def test_the_verifier_runs_alone_with_python_and_cryptography(
    evidence: Evidence, export: Export, tmp_path: Path
) -> None:
    file, alone = export("--with-payloads"), tmp_path / "alone"
    site = Path(sysconfig.get_path("purelib"))
    (alone / "libraries").mkdir(parents=True)
    for name in ("cryptography", *(path.name for path in site.glob("*cffi*"))):
        (alone / "libraries" / name).symlink_to(site / name)
    (alone / "app").mkdir()
    (alone / "app" / "audit").symlink_to(ROOT / "app" / "audit")
    (alone / "elsewhere").symlink_to(ROOT / "app" / "audit")

    def run(module: str, *options: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-S", "-B", "-W", "error", "-m", module, file, *options],
            cwd=alone,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(alone / "libraries")},
            capture_output=True,
            text=True,
            check=False,
        )

    key = ("--public-key", str(tmp_path / "audit-public-key.pem"))
    for module in ("app.audit", "elsewhere"):
        result = run(module, *key, "--anchor", str(evidence.anchor))
        assert result.stderr == ""
        assert result.returncode == 0
        assert result.stdout.endswith("Everything that was checked holds.\n")
    file.write_text(file.read_text().replace('"worker:', '"nobody:', 1))
    assert run("app.audit", *key).returncode == 1
    assert run("app.audit", "--public-key", str(file)).returncode == 2


def test_the_command_says_the_same(evidence: Evidence, export: Export) -> None:
    words = (
        "verify",
        "--export",
        str(export()),
        "--public-key",
        str(evidence.anchor.with_name("audit-public-key.pem")),
    )
    result = evidence.audit(*words, DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert result.exit_code == 0, result.output
    assert "Not checked: whether the same checkpoints are anchored (--anchor)." in result.stdout
    assert "Not checked: payloads, which were not exported." in result.stdout


@pytest.mark.parametrize("tamper", [edit_an_event, rewrite_with_the_signing_key])
def test_what_was_changed_before_the_export_is_seen_in_it(
    evidence: Evidence, export: Export, check: Check, tamper: Callable[[Evidence], None]
) -> None:
    tamper(evidence)
    assert {finding["check"] for finding in evidence.verify()["findings"]} == {
        str(finding.check) for finding in check(export("--with-payloads")).findings
    }


# -- some runs only


def test_a_tenants_export_names_no_other_tenants_run(evidence: Evidence, export: Export, check: Check) -> None:
    file = export("--tenant", "bank")
    report = check(file)
    assert (report.findings, report.runs, report.checkpoints) == ([], 1, 1)
    text = file.read_text()
    for name, run_id in evidence.runs.items():
        assert (str(run_id) in text) == (name == "of another tenant")
    assert "shop" not in text


def test_checkpoints_that_have_nothing_to_do_with_a_tenant_are_not_missed(export: Export, check: Check) -> None:
    file = export("--tenant", "bank")
    header, rest = file.read_text().split("\n", 1)
    later = {"export": {**json.loads(header)["export"], "at": "2100-01-01T00:00:00+00:00"}}
    file.write_text(f"{json.dumps(later, separators=(',', ':'))}\n{rest}")
    assert check(file).findings == []


def test_one_runs_export_still_shows_that_a_checkpoint_holds_it(
    evidence: Evidence, export: Export, check: Check
) -> None:
    file = export("--run", str(evidence.runs["failed"]))
    assert check(file).findings == []
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if str(evidence.runs["failed"]) not in line or '"leaf"' not in line]
    assert len(kept) == len(lines) - 1
    file.write_text("".join(kept))
    assert {"root", "file"} == {finding.check for finding in check(file).findings}
    with evidence.connect() as connection:
        connection.execute("UPDATE audit_leaves SET hash = sha256('x') WHERE run_id = %s", [evidence.runs["cancelled"]])
    assert {finding.check for finding in check(export("--run", str(evidence.runs["failed"]))).findings} == {"root"}


def test_runs_are_chosen_by_when_they_were_accepted(evidence: Evidence, export: Export, check: Check) -> None:
    with psycopg.connect(evidence.owner_url) as connection:
        connection.execute("UPDATE runs SET created_at = '2020-06-01' WHERE id = %s", [evidence.runs["alike"]])
    assert check(export("--until", "2021-01-01")).runs == 1
    assert check(export("--since", "2021-01-01T00:00:00")).runs == len(evidence.runs) - 1
    assert check(export("--since", "2020-06-01", "--until", "2020-06-01")).runs == 0


def test_a_run_that_is_not_there_is_told(evidence: Evidence, tmp_path: Path) -> None:
    unknown = "01890000-0000-7000-8000-000000000000"
    result = evidence.audit("export", "--run", unknown, str(tmp_path / "none.jsonl"))
    assert (result.exit_code, result.stderr) == (1, f"agent-service: there is no run {unknown}\n")
    assert not (tmp_path / "none.jsonl").exists()


# -- payloads


def test_payloads_leave_only_with_an_event_that_says_so(evidence: Evidence, export: Export, check: Check) -> None:
    assert not any("payload" in line for line in lines_of(export()))
    file = export("--with-payloads", "--tenant", "shop")
    report = check(file)
    assert report.findings == []
    assert report.payloads > 0
    for name, run_id in evidence.runs.items():
        last = evidence.events(name)[-1]
        if name == "of another tenant":
            assert last.kind != "run.read" or '"export"' not in last.data
        else:
            assert (last.kind, json.loads(last.data)["what"]) == ("run.read", "export")
            assert last.actor.startswith("operator:")
            assert str(run_id) in file.read_text()
    assert evidence.verify()["holds"]


def test_a_payload_that_was_edited_shows_in_an_export(evidence: Evidence, export: Export, check: Check) -> None:
    edit_a_payload(evidence)
    [finding] = check(export("--with-payloads")).findings
    assert (finding.check, finding.subject) == ("payload", str(evidence.runs["succeeded"]))


def test_payloads_of_a_run_that_does_not_say_so_stay_behind(evidence: Evidence, check: Check, tmp_path: Path) -> None:
    """As of a run that is accepted while an export begins."""
    evidence.audit("verify")  # leaves the public key
    with open_audit_log(evidence.database_url, with_payloads=True) as log, (tmp_path / "out").open("w") as file:
        AuditWriter(file, "an export that no run has heard of").write(log, EVERYTHING)
    report = check(tmp_path / "out")
    assert (report.findings, report.payloads) == ([], 0)
    assert '{"payload"' not in (tmp_path / "out").read_text()


# -- commands


def test_checkpoints_made_after_the_export_are_no_finding(evidence: Evidence, export: Export, check: Check) -> None:
    file = export()
    evidence.seal()
    assert check(file).findings == []


@pytest.mark.parametrize(
    "content", ["", "{}\n", "no JSON\n", '{"export": {"format": 99}}\n', '["export"]\n', "\x1f\x8b"]
)
def test_what_is_no_export_is_wrong_usage(evidence: Evidence, tmp_path: Path, content: str) -> None:
    (tmp_path / "other").write_text(content, encoding="latin-1")
    evidence.audit("verify")  # leaves the public key
    key = str(evidence.anchor.with_name("audit-public-key.pem"))
    result = evidence.audit("verify", "--export", str(tmp_path / "other"), "--public-key", key)
    assert (result.exit_code, result.stdout) == (2, "")
    assert str(tmp_path / "other") in result.stderr
    assert evidence.audit("verify", "--export", str(tmp_path / "other")).exit_code == 2


def test_a_new_key_pair_fits_together(evidence: Evidence) -> None:
    made = evidence.audit("keygen")
    assert made.stdout.startswith("-----BEGIN PRIVATE KEY-----")
    again = evidence.audit("keygen", "--public", input=made.stdout)
    assert again.stdout == made.stderr
    refused = evidence.audit("keygen", "--public", input="hunter2")
    assert (refused.exit_code, "hunter2" in refused.output) == (2, False)
