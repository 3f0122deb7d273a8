"""Verifies with nothing but files: an export, public keys, checkpoints that were anchored."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from .exported import Export
from .keys import load_public_key
from .proof import Checkpoint
from .report import Report
from .verifier import GRACE, Anchored, verify, written


def verify_export(export: Path, public_keys: Iterable[Path], anchor: Path | None) -> Report:
    """Raises `OSError`, `NotAnExport`, and `ValueError` where a key is none."""
    keys = [read_public_key(path) for path in public_keys]
    source = Export(export)
    expected = anchored = None
    if anchor:
        anchored = Anchored(read_checkpoints(anchor))
        # Checkpoints of after the export are no wonder; clocks may differ a little.
        long_before = written(source.at - GRACE)
        expected = Anchored(one for one in read_checkpoints(anchor) if _made_at(one) < long_before)
    report = verify(source, keys, expected=expected, anchored=anchored)
    if not anchor:
        report.notes.append("whether the same checkpoints are anchored (--anchor)")
    if not source.has_all_checkpoints:
        report.notes.append("runs that were not exported")
    if not source.has_payloads:
        report.notes.append("payloads, which were not exported")
    return report


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Raises `OSError` and `ValueError`."""
    try:
        return load_public_key(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def read_checkpoints(path: Path) -> Iterator[Checkpoint]:
    """Those in a file of lines as `Checkpoint.line` makes them; a line that was torn by a crash is left out."""
    with path.open("rb") as file:
        for line in file:
            try:
                yield Checkpoint.of_line(line)
            except ValueError:
                continue


def _made_at(checkpoint: Checkpoint) -> str:
    """When it says that it was made; one that does not say so counts as old."""
    return str(checkpoint.content.get("at", ""))
