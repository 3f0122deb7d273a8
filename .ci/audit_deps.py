"""`make audit-deps`: the vulnerabilities that are known of what requirements.lock pins, from OSV, by `uv audit`.

Exit code 1 where there are any. Where nobody can be asked it says so and is content: a build without network goes on.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)
FOUND = 1
PATIENCE = {"UV_HTTP_TIMEOUT": "20", "UV_HTTP_RETRIES": "1"}

# uv audits its own lock file only. This one is nobody's: the registry is a name that cannot exist, and is not asked.
_PROJECT = """\
[project]
name = "audited"
version = "0"
requires-python = ">=3.11"
dependencies = [{}]
"""
_LOCK = """\
version = 1
requires-python = ">=3.11"

[[package]]
name = "audited"
version = "0"
source = {{ virtual = "." }}
dependencies = [{}]
"""
_PACKAGE = """
[[package]]
name = "{}"
version = "{}"
source = {{ registry = "https://registry.invalid/" }}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lock", type=Path, default=LOCK, help="another file of pinned requirements")
    parser.add_argument("--service-url", help="another server that speaks OSV's protocol")
    options = parser.parse_args()
    pins = PIN.findall(options.lock.read_text())
    if not pins:
        sys.exit(f"{options.lock} pins nothing")
    if importlib.util.find_spec("uv") is None:
        return _not_asked("uv is not installed")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _write_project(directory, pins)
        command = [sys.executable, "-m", "uv", "audit", "--frozen", "--preview-features", "audit-command"]
        command += ["--service-url", options.service_url] if options.service_url else []
        ended = subprocess.run(
            command, cwd=directory, env={**os.environ, **PATIENCE}, capture_output=True, text=True, check=False
        )
    if ended.returncode not in (0, FOUND):
        return _not_asked(" ".join(ended.stderr.split()))
    print(ended.stdout.strip() or f"Nothing is known against the {len(pins)} packages of {options.lock.name}.")
    return ended.returncode


def _write_project(directory: Path, pins: list[tuple[str, str]]) -> None:
    (directory / "pyproject.toml").write_text(
        _PROJECT.format(", ".join(f'"{name}=={version}"' for name, version in pins))
    )
    packages = [_PACKAGE.format(name, version) for name, version in pins]
    names = ", ".join(f'{{ name = "{name}" }}' for name, _ in pins)
    (directory / "uv.lock").write_text("".join([_LOCK.format(names), *packages]))


def _not_asked(why: str) -> int:
    print(f"audit-deps: known vulnerabilities could not be looked up, so none are listed: {why}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
