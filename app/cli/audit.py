"""`agent-service audit`: keys, verification, exports, erasure."""

import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import click

from app.cli.database import database_errors
from app.cli.erasure import erase, operator, retain
from app.cli.failure import fail

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from app.audit.report import Report
    from app.config import AuditSettings

PUBLIC_KEY_FILE = "audit-public-key.pem"
"""Where the public key is looked for when none is given: beside a file of checkpoints."""
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def audit() -> None:
    """Verify, export and erase what is recorded about runs."""


audit.add_command(erase)
audit.add_command(retain)


@audit.command()
@click.option("--public", is_flag=True, help="Read a private key from standard input and print its public half.")
def keygen(public: bool) -> None:
    """Print a new private key for AUDIT_SIGNING_KEY; its public half goes to standard error."""
    from app.audit.keys import new_private_key_pem, public_key_pem

    if public:
        try:
            click.echo(public_key_pem(sys.stdin.read()), nl=False)
        except ValueError as error:
            raise click.UsageError(f"standard input {error}") from None
        return
    private = new_private_key_pem()
    click.echo(private, nl=False)
    click.echo(public_key_pem(private), nl=False, err=True)


@audit.command()
@click.option("--public-key", "key_files", type=_FILE, multiple=True, help="PEM; several where the key was changed.")
@click.option("--anchor", help="Where checkpoints are kept outside of the database.  [default: AUDIT_ANCHOR]")
@click.option("--payloads", is_flag=True, help="Hash what people and models wrote, too.")
@click.option("--since-run", type=click.UUID, metavar="ID", help="Leave out the runs before this one.")
@click.option("--export", "export_file", type=_FILE, help="Verify an export; needs no database.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def verify(
    *,
    key_files: Sequence[Path],
    anchor: str | None,
    payloads: bool,
    since_run: UUID | None,
    export_file: Path | None,
    as_json: bool,
) -> None:
    """Does everything that was recorded still hold? Exit codes: 0 yes, 1 no (each finding is listed), 2 wrong usage."""
    if export_file and (payloads or since_run):
        raise click.UsageError("--payloads and --since-run are for the database: an export holds what it holds")
    if export_file:
        report = _verify_export(export_file, key_files, anchor)
    else:
        report = _verify_database(key_files, anchor, payloads=payloads, since_run=since_run)
    if as_json:
        click.echo(json.dumps(report.as_json()))
    else:
        for line in report.lines():
            click.echo(line)
    sys.exit(not report.holds)


def _verify_export(export: Path, key_files: Sequence[Path], anchor: str | None) -> "Report":
    from app.audit.exported import NotAnExport
    from app.audit.offline import verify_export

    if not key_files:
        raise click.UsageError("an export is verified with --public-key")
    try:
        return verify_export(export, key_files, Path(anchor) if anchor else None)
    except (OSError, NotAnExport, ValueError) as error:
        raise click.UsageError(str(error)) from None


def _verify_database(
    key_files: Sequence[Path], anchor: str | None, *, payloads: bool, since_run: UUID | None
) -> "Report":
    from app.anchor import open_anchor
    from app.audit.verifier import Anchored, verify
    from app.config import AuditSettings, load_settings
    from app.db.audit_log import open_audit_log
    from app.domain.errors import AnchorUnavailable

    settings = load_settings(AuditSettings)
    keys = list(_public_keys(key_files, settings))
    url = settings.database_url.get_secret_value()
    try:
        outside = open_anchor(anchor or settings.audit_anchor)
        expected = Anchored(outside.read())
        with database_errors(), open_audit_log(url, since_run=since_run, with_payloads=payloads) as log:
            anchored = Anchored(outside.read())
            if not keys and log.is_sealed:
                raise click.UsageError("checkpoints are there and no key to verify them with: give --public-key")
            report = verify(log, keys, expected=expected, anchored=anchored)
            report.warnings += log.rights_to_tamper()
    except AnchorUnavailable as error:
        fail(f"the anchor: {error}")
    if not payloads:
        report.notes.append("whether payloads are what was hashed (--payloads)")
    if since_run:
        report.notes.append(f"runs before {since_run}")
    return report


def _public_keys(files: Sequence[Path], settings: "AuditSettings") -> "Iterator[Ed25519PublicKey]":
    """Those that were given; otherwise the signing key's public half, or what lies beside the checkpoints."""
    from app.audit.keys import load_private_key
    from app.audit.offline import read_public_key
    from app.domain.errors import ConfigurationError

    beside = Path(settings.audit_anchor).parent / PUBLIC_KEY_FILE
    if not files and settings.audit_signing_key:
        try:
            yield load_private_key(settings.audit_signing_key.get_secret_value()).public_key()
        except ValueError as error:
            raise ConfigurationError(f"AUDIT_SIGNING_KEY is malformed: {error}") from None
        return
    for path in files or ([beside] if beside.is_file() else []):
        try:
            yield read_public_key(path)
        except (OSError, ValueError) as error:
            raise click.UsageError(str(error)) from None


@audit.command()
@click.option(
    "--run", "run_ids", type=click.UUID, multiple=True, metavar="ID", help="This run; several times for more."
)
@click.option("--tenant", help="Runs of this tenant.")
@click.option("--since", type=click.DateTime(), help="Runs accepted from then on (UTC).")
@click.option("--until", type=click.DateTime(), help="Runs accepted before then (UTC).")
@click.option("--with-payloads", is_flag=True, help="What people and models wrote, too. Each run records that it left.")
@click.argument("out", type=click.Path(path_type=Path))
def export(
    *,
    run_ids: Sequence[UUID],
    tenant: str | None,
    since: datetime | None,
    until: datetime | None,
    with_payloads: bool,
    out: Path,
) -> None:
    """Write the audit of all runs, or of some, to OUT: `.jsonl`, `.jsonl.gz`, or `-` for standard output."""
    import psycopg

    from app.config import DatabaseSettings, load_settings
    from app.db.audit_selection import Selection, unknown_runs
    from app.export import export_audit

    selection = Selection(
        run_ids=list(run_ids) or None,
        tenant=tenant,
        since=since.replace(tzinfo=UTC) if since else None,
        until=until.replace(tzinfo=UTC) if until else None,
    )
    url = load_settings(DatabaseSettings).database_url.get_secret_value()
    with database_errors():
        if run_ids:
            with psycopg.connect(url) as connection:
                if unknown := unknown_runs(connection, list(run_ids)):
                    fail(f"there is no run {unknown[0]}")
        try:
            counts = export_audit(url, out, selection, with_payloads=with_payloads, actor=operator())
        except OSError as error:
            fail(f"{out}: {error.strerror}")
    click.echo("Exported " + ", ".join(f"{count:,} {what}" for what, count in counts.items()) + ".", err=True)
