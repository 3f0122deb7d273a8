"""What holds for every file that deploys, whatever its format: no secret, no image by a tag, no careless script."""

import math
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.deploy.compose import merged
from tests.deploy.tools import ROOT, accepts
from tests.deploy.workload import DEPLOY

KEYS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_\w{30,}"
    r"|\bAIza[\w-]{30,}|\bxox[abp]-\w+|\blsv2_\w+|\bsk-lf-[0-9a-f]{8}-|\beyJ[\w-]{20,}\.|://[^\s/:@$<{]+:[^\s/@$<{…]{3,}@"
)
LETTERS = re.compile(r"(?<![\w+/.:-])[A-Za-z0-9+/_-]{24,}={0,2}(?![\w+/=.:-])")
RANDOM_BITS = 4.3
"""Of entropy a character, above which text of this length is no longer words; base64 of random bytes has more."""
FILES = sorted(
    path
    for folder in (DEPLOY, ROOT / ".github")
    for path in folder.rglob("*")
    if path.is_file() and path.suffix not in {".svg", ".pyc"}
)
PASSWORDS_OF_DEVELOPMENT = re.compile(r"\$\{[A-Z_]+:-[a-z-]+\}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_looks_like_a_secret(path: Path) -> None:
    text = PASSWORDS_OF_DEVELOPMENT.sub("", path.read_text())
    assert KEYS.findall(text) == []
    assert [word for word in LETTERS.findall(text) if is_random(word)] == []


def is_random(word: str) -> bool:
    """As keys are; the commit of an action and the digest of an image are not secret, and all of one alphabet."""
    if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}|0+", word) or not re.search(r"\d", word):
        return False
    parts = Counter(word).values()
    return -sum(part / len(word) * math.log2(part / len(word)) for part in parts) > RANDOM_BITS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_image_of_ours_is_never_named_by_a_tag(path: Path) -> None:
    assert re.findall(r"[\w./-]*/agent-service:(?!\$\{)[\w.-]+", path.read_text()) == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix == ".sh"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    accepts("shellcheck", "--external-sources", "--source-path=SCRIPTDIR", path)


SCRIPTS = sorted(path for path in DEPLOY.rglob("*.sh") if path.name in {"deploy.sh", "promote.sh"})
TAG = "registry.example.com/agent-service:1.0.0"
NO_DIGEST_AT_ALL = "registry.example.com/agent-service@sha256:0123"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize("image", [TAG, f"{TAG}@sha256:", NO_DIGEST_AT_ALL, ""])
def test_a_script_that_deploys_takes_nothing_but_a_digest(path: Path, image: str, tmp_path: Path) -> None:
    """It refuses before it asks anybody: no program of a cloud can be found."""
    for program in ("bash", "dirname", "env", "python3", "cat", "grep", "sed"):
        found = shutil.which(program)
        assert found is not None
        (tmp_path / program).symlink_to(found)
    given = [image, "staging"] if path.parent.name == "compose" else ["staging", image]
    done = subprocess.run([path, *given], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr


def test_every_target_has_a_page_about_it() -> None:
    """One page: what it makes, the commands in their order, and what nobody has checked."""
    folders = [path for path in DEPLOY.iterdir() if path.is_dir() and path.name not in {"image", "observability"}]
    assert [path.name for path in folders if not (path / "README.md").exists()] == []


@pytest.mark.parametrize("overlay", [None, "staging", "production"])
def test_what_the_compose_files_come_to_has_the_right_form(overlay: str | None) -> None:
    accepts("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "-", given=merged(overlay))
