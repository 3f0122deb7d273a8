"""The lock files: `lock.py` renews them, `lock.py --check` says whether they still belong to pyproject.toml.

The check needs no network: the first line of each file is a digest of what pyproject.toml asks for.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN_TIME = "requirements.lock"
DEVELOPMENT = "requirements-dev.lock"


def asked_for() -> str:
    """The first line of the lock files, as it has to be."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    wishes = [project["requires-python"], project["dependencies"], pyproject["dependency-groups"]]
    return f"# Made by `make lock` for {hashlib.sha256(json.dumps(wishes).encode()).hexdigest()}"


def renew(*, upgrade: bool) -> None:
    """Resolve for all platforms. Pins that still fit stay as they are, unless everything is to be upgraded."""
    _compile(RUN_TIME, *(["--upgrade"] if upgrade else []))
    _compile(DEVELOPMENT, "--group=dev", f"--constraints={RUN_TIME}", *(["--upgrade"] if upgrade else []))


def _compile(lock: str, *options: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--output-file", lock, "--quiet"),
            *("--universal", "--python-version=3.11", "--generate-hashes", "--no-emit-index-url", "--no-header"),
            *options,
        ],
        cwd=ROOT,
        check=True,
    )
    path = ROOT / lock
    path.write_text(f"{asked_for()}\n{path.read_text()}")


def problems() -> list[str]:
    """What is wrong with the lock files, without asking anybody."""
    texts = {name: (ROOT / name).read_text() for name in (RUN_TIME, DEVELOPMENT)}
    found = [
        f"{name} is not of this pyproject.toml" for name, text in texts.items() if not text.startswith(asked_for())
    ]
    found += [f"{name} names an index" for name, text in texts.items() if re.search(r"://|--(extra-)?index|-f ", text)]
    pins = {name: set(re.findall(r"^[^\s#].*(?= \\$)", text, re.MULTILINE)) for name, text in texts.items()}
    found += [f"{DEVELOPMENT} has not {pin}" for pin in sorted(pins[RUN_TIME] - pins[DEVELOPMENT])]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where `make lock` is due")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    options = parser.parse_args()
    if not options.check:
        renew(upgrade=options.upgrade)
    if found := problems():
        sys.exit("\n".join([*found, "Run `make lock`."]))


if __name__ == "__main__":
    main()
