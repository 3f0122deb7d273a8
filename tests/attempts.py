"""What was tried against the service, and what came of it, as a document: `python -m tests.attempts` writes it.

Each row is an attempt that some test makes; for addresses, the rows are the very table that the tests go through.
"""

from collections.abc import Iterator
from pathlib import Path

from tests.worker.ssrf import ATTEMPTS

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "attempts.md"
OTHERS = Path(__file__).with_name("attempts.md")
"""What is not about addresses, by hand: sections of rows, each naming the test that makes the attempt."""
PORT = "8443"


def document() -> str:
    return OTHERS.read_text() + "\n".join(_addresses()) + "\n"


def _addresses() -> Iterator[str]:
    yield "## Addresses"
    yield ""
    yield f"{len(ATTEMPTS)} attempts to lead the service to where it must not go, as a tool's argument, and as a"
    yield "webhook's address where they can be one. Each names as allowed whatever it can. On loopback a server"
    yield f"listens, at the port that {PORT} stands for, and sees none of them (`tests/worker/test_egress.py`)."
    yield ""
    yield "| asked for | how | answer |"
    yield "|---|---|---|"
    for attempt in ATTEMPTS:
        url = attempt.url.replace("{port}", PORT)
        yield f"| {_code(url)} | {attempt.how} | {attempt.answer.removesuffix(' Allowed:')} |"


def _code(text: str) -> str:
    """Whatever it is, to be read and not to be followed."""
    shown = text.encode("unicode_escape").decode("ascii").replace("\\\\", "\\").replace("|", "\\|")
    return f"`{shown}`"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
