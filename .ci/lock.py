"""The lock files: `lock.py` renews them, `lock.py --check` says whether they still belong to pyproject.toml.

The check needs no network: the first line of each file is a digest of what was asked for, by pyproject.toml or here.
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
DEPLOYMENT = "requirements-deploy.lock"
"""Of the tools that `make verify-deploy` and `make sbom` run, in an environment of their own."""
PHOENIX = "requirements-phoenix.lock"
"""Of the server that `make test-phoenix` starts, in an environment of its own: nothing of ours depends on it."""
PHOENIX_ITSELF = "arize-phoenix>=20,<21"


def asked_for(lock: str) -> str:
    """The first line of a lock file, as it has to be."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, groups = pyproject["project"], pyproject["dependency-groups"]
    wishes: dict[str, object] = {
        RUN_TIME: [project["requires-python"], project["dependencies"]],
        DEVELOPMENT: [project["requires-python"], project["dependencies"], groups["dev"]],
        DEPLOYMENT: [project["requires-python"], groups["deploy"]],
        PHOENIX: PHOENIX_ITSELF,
    }
    return f"# Made by `make lock` for {hashlib.sha256(json.dumps(wishes[lock]).encode()).hexdigest()}"


def renew(*, upgrade: bool) -> None:
    """Resolve for all platforms. Pins that still fit stay as they are, unless everything is to be upgraded."""
    newest = ["--upgrade"] if upgrade else []
    _compile(RUN_TIME, "pyproject.toml", *newest)
    _compile(DEVELOPMENT, "pyproject.toml", "--group=dev", f"--constraints={RUN_TIME}", *newest)
    _compile(DEPLOYMENT, "--group=deploy", *newest)
    _compile(PHOENIX, "-", *newest)


def _compile(lock: str, *options: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "--output-file", lock, "--quiet"),
            *("--universal", "--python-version=3.11", "--generate-hashes", "--no-emit-index-url", "--no-header"),
            *options,
        ],
        cwd=ROOT,
        check=True,
        input=PHOENIX_ITSELF,
        text=True,
    )
    path = ROOT / lock
    path.write_text(f"{asked_for(lock)}\n{path.read_text()}")


def problems() -> list[str]:
    """What is wrong with the lock files, without asking anybody."""
    texts = {name: (ROOT / name).read_text() for name in (RUN_TIME, DEVELOPMENT, DEPLOYMENT, PHOENIX)}
    found = [
        f"{name} was made for something else" for name, text in texts.items() if not text.startswith(asked_for(name))
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
