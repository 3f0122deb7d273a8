"""The programs that know the formats: those of `.venv-deploy`, which `make verify-deploy` makes."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-deploy"


def tool(name: str) -> str:
    """The path of a program of `.venv-deploy`. Where there is none, the test fails and says how to get it."""
    path = ENVIRONMENT / "bin" / name
    if not path.exists():
        pytest.fail(f"{name} is not in {ENVIRONMENT.name}: run `make verify-deploy`", pytrace=False)
    return str(path)


def site_packages() -> Path:
    """Where the packages of `.venv-deploy` are, for those that are read and not run."""
    return next((ENVIRONMENT / "lib").glob("python3.*/site-packages"))


def run(name: str, *arguments: str | Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program of `.venv-deploy` in the root of the project. `given`: what it reads from standard input."""
    return subprocess.run(
        [tool(name), *map(str, arguments)], cwd=ROOT, input=given, capture_output=True, text=True, check=False
    )


def accepts(name: str, *arguments: str | Path, given: str | None = None) -> None:
    """Run a program that exits with 0 where it has nothing to complain about; fail with what it printed otherwise."""
    done = run(name, *arguments, given=given)
    if done.returncode != 0:
        pytest.fail(f"{name} exited with {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False)
