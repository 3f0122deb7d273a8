"""Schemathesis against a real API: what the OpenAPI document says is what happens, whatever is sent.

All of its checks are on. A few answers that no schema can foresee are excused, each for its reason, in `excuses`.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.devstack.access import make_key
from app.devstack.stack import ROOT
from app.domain.review import ReviewKind
from tests.stack import clean_env
from tests.waiting import limit_request, put_to_wait, request

PHASES = "examples,coverage,fuzzing,stateful"
TENANTS = ("fuzz", "peer")
"""The second one looks at what belongs to the first: it must not be given anything of it."""
SLOWEST_SECONDS = 75
"""No answer takes longer: a poll may wait for a minute."""
REVIEWS = 6
SILENT = {"WEBHOOK_SIGNING_KEY": ""}
"""Of the worker: whose addresses are made up here, is not to be asked anything."""

_CONFIGURATION = """\
hooks = "{hooks}"
request-timeout = {timeout}
continue-on-failure = true
[auth.wfc]
path = "{users}"
peers = ["fuzz", "peer"]
user = "fuzz"
[generation]
database = "none"
[warnings]
enabled = false
[cache]
enabled = false
"""


@dataclass(frozen=True)
class Outcome:
    """What schemathesis found. `tested` of `operations` operations, with `requests`; `text` is its own report."""

    failures: int
    errors: int
    operations: int
    tested: int
    requests: int
    text: str

    @property
    def is_clean(self) -> bool:
        return not self.failures and not self.errors and self.tested == self.operations


def fuzz(
    address: str,
    database_url: str,
    directory: Path,
    *,
    seed: int,
    examples: int,
    seconds: float | None = None,
    workers: int = 1,
) -> Outcome:
    """Fuzz the API with so many examples for each operation in each phase; with `seconds`, again and again for so long.

    Without, the same seed gives the same requests.
    """
    keys = {tenant: make_key(database_url, tenant=tenant, name="fuzz") for tenant in TENANTS}
    _leave_something_to_decide(database_url)
    report = directory / "report.json"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", _configure(directory, keys)),
        *("run", f"{address}/openapi.json", "--checks", "all", "--phases", PHASES, "--seed", str(seed)),
        *("--max-examples", str(examples), "--workers", str(workers)),
        *(("--max-time", str(int(seconds))) if seconds else ()),
        *("--report", "json", "--report-json-path", str(report)),
    ]
    env = clean_env(PYTHONPATH=str(ROOT), NO_PROXY="*")
    ended = subprocess.run(command, check=False, cwd=directory, env=env, capture_output=True, text=True)
    assert report.exists(), ended.stdout + ended.stderr
    found = json.loads(report.read_text())
    return Outcome(
        failures=found["test_cases"]["unique_failures"],
        errors=len(found["errors"]) + (ended.returncode not in (0, 1)),
        operations=found["operations"]["total"],
        tested=found["operations"]["tested"],
        requests=found["test_cases"]["generated"],
        text=ended.stdout,
    )


def _configure(directory: Path, keys: Mapping[str, str]) -> str:
    users = [
        {"name": tenant, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {key}"}]}
        for tenant, key in keys.items()
    ]
    (directory / "users.json").write_text(json.dumps({"auth": users}))
    file = directory / "schemathesis.toml"
    file.write_text(
        _CONFIGURATION.format(hooks="tests.fuzz.excuses", users=directory / "users.json", timeout=SLOWEST_SECONDS)
    )
    return str(file)


def _leave_something_to_decide(database_url: str) -> None:
    for number in range(REVIEWS):
        asked = limit_request() if number % 2 else request(ReviewKind.APPROVAL)
        put_to_wait(database_url, asked, tenant=TENANTS[0])


def errors_in(log: Path) -> list[str]:
    """The lines in which a process tells of a bug."""
    return [line for line in log.read_text().splitlines() if json.loads(line)["level"] in ("error", "critical")]
