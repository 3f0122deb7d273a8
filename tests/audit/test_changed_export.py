"""Every change that is made to an export is seen."""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import chain, pairwise
from pathlib import Path

from tests.audit.evidence import Check, Evidence, Export, Json
from tests.audit.tampering import delete_the_newest_checkpoint


def test_a_file_that_is_cut_off_is_seen(export: Export, check: Check, tmp_path: Path) -> None:
    file, cut = export(), tmp_path / "cut.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for kept in range(1, len(lines)):
        cut.write_text("".join(lines[:kept]))
        assert "file" in {finding.check for finding in check(cut).findings}, kept
    cut.write_bytes(file.read_bytes()[:-30])
    assert {finding.check for finding in check(cut).findings} == {"file"}
    packed = export(name="whole.jsonl.gz").read_bytes()
    for length in (len(packed) - 4, len(packed) // 2):
        cut.write_bytes(packed[:length])
        assert "file" in {finding.check for finding in check(cut).findings}


def test_every_line_that_is_taken_out_or_doubled_is_seen(export: Export, check: Check, tmp_path: Path) -> None:
    lines, changed = export("--with-payloads").read_text().splitlines(keepends=True), tmp_path / "changed.jsonl"
    for number in range(1, len(lines)):
        for change in (lines[:number] + lines[number + 1 :], [*lines[:number], lines[number], *lines[number:]]):
            changed.write_text("".join(change))
            assert not check(changed).holds, lines[number]


def test_every_character_that_is_changed_is_seen(export: Export, check: Check, tmp_path: Path) -> None:
    """One line of each kind, but for the first, which says when and by which release it was written."""
    lines, changed = export("--with-payloads").read_text().splitlines(keepends=True), tmp_path / "changed.jsonl"
    for kind in ("checkpoint", "leaf", "run", "hash", "payload", "end"):
        line = next(line for line in lines if line.startswith(f'{{"{kind}"'))
        for at in range(0, len(line) - 1, 3):
            other = "0" if line[at] != "0" else "1"
            altered = line[:at] + other + line[at + 1 :]
            changed.write_text("".join(altered if one is line else one for one in lines))
            assert not check(changed).holds, altered


def rehashed(evidence: Evidence, file: Path, change: Callable[[int, Json], None]) -> None:
    """Change events of the run that no checkpoint has seen, so that all hashes fit again."""
    lines = file.read_text().splitlines()
    begin = next(at for at, line in enumerate(lines) if f'{{"run":{{"id":"{evidence.runs["not sealed"]}"' in line)
    previous = None
    for at in range(begin + 1, len(lines) - 1):
        event = {**json.loads(lines[at])["event"], "previous": previous}
        change(event["seq"], event)
        text = json.dumps(event, sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256(text.encode()).hexdigest()
        lines[at] = f'{{"hash":"{previous}","event":{text}}}'
    run = json.loads(lines[begin])
    run["run"]["head"]["hash"] = previous
    lines[begin] = json.dumps(run, separators=(",", ":"))
    file.write_text("\n".join(lines) + "\n")


def test_a_chain_that_begins_anew_in_its_middle_is_seen(evidence: Evidence, export: Export, check: Check) -> None:
    rehashed(evidence, file := export(), lambda seq, event: event.update(previous=None) if seq == 4 else None)
    [finding] = check(file).findings
    assert (finding.check, finding.sentence.startswith("event 4 (")) == ("chain", True)


def test_an_event_of_another_run_is_seen(evidence: Evidence, export: Export, check: Check) -> None:
    other = str(evidence.runs["alike"])
    rehashed(evidence, file := export(), lambda seq, event: event.update(run_id=other) if seq == 4 else None)
    assert "file" in {finding.check for finding in check(file).findings}


def blocks_of(file: Path) -> tuple[list[str], list[list[str]], Json]:
    """The lines before the runs, those of each run, and the counts at the end."""
    *lines, end = file.read_text().splitlines(keepends=True)
    begins = [at for at, line in enumerate(lines) if line.startswith('{"run"')]
    blocks = [lines[begin:until] for begin, until in pairwise([*begins, len(lines)])]
    return lines[: begins[0]], blocks, json.loads(end)["end"]


def write_blocks(file: Path, before: list[str], blocks: list[list[str]], counts: Json) -> None:
    counts |= {"runs": len(blocks), "events": sum(len(block) - 1 for block in blocks)}
    end = json.dumps({"end": counts}, separators=(",", ":"))
    file.write_text("".join([*before, *chain.from_iterable(blocks), end, "\n"]))


def test_a_sealed_run_that_was_left_out_is_seen(evidence: Evidence, export: Export, check: Check) -> None:
    before, blocks, counts = blocks_of(file := export())
    for left in (blocks[1:], blocks[:3] + blocks[4:], blocks[:3]):
        write_blocks(file, before, left, counts)
        report = check(file)
        missing = {finding.subject for finding in report.findings}
        assert {finding.check for finding in report.findings} == {"leaf"}
        kept = {json.loads(block[0])["run"]["id"] for block in left}
        sealed = {str(run_id) for name, run_id in evidence.runs.items() if name != "not sealed"}
        assert missing == sealed - kept


def test_runs_in_another_order_are_seen(export: Export, check: Check) -> None:
    before, blocks, counts = blocks_of(file := export())
    write_blocks(file, before, [*blocks[:-2], blocks[-1], blocks[-2]], counts)
    assert "file" in {finding.check for finding in check(file).findings}


def test_an_export_of_a_restored_backup_is_seen(evidence: Evidence, export: Export, check: Check) -> None:
    delete_the_newest_checkpoint(evidence)
    header, rest = (file := export()).read_text().split("\n", 1)
    later = {"export": {**json.loads(header)["export"], "at": f"{datetime.now(UTC) + timedelta(days=1)}"}}
    file.write_text(f"{json.dumps(later, separators=(',', ':'))}\n{rest}")
    assert {finding.check for finding in check(file).findings} == {"anchor", "unsealed"}
