"""Verifies an export: `python -m app.audit EXPORT --public-key FILE`.

Exit codes: 0 everything holds, 1 something does not, 2 wrong usage.
"""

import argparse
import json
import sys
from pathlib import Path

from .exported import NotAnExport
from .offline import verify_export


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m app.audit", description="Verify an export of the audit.")
    parser.add_argument("export", type=Path, help="what `agent-service audit export` has written")
    parser.add_argument(
        "--public-key", type=Path, action="append", required=True, help="PEM; several where the key was changed"
    )
    parser.add_argument("--anchor", type=Path, help="the file in which checkpoints are kept outside of the database")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()
    try:
        report = verify_export(options.export, options.public_key, options.anchor)
    except (OSError, NotAnExport, ValueError) as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(report.as_json()))  # noqa: T201
    else:
        print(*report.lines(), sep="\n")  # noqa: T201
    return 0 if report.holds else 1


sys.exit(main())
