"""The document of attempts is that of the tests, and every test that it names exists."""

import re

from tests.attempts import DOCUMENT, OTHERS, document


def test_the_document_of_attempts_is_the_tables_of_the_tests() -> None:
    assert DOCUMENT.read_text() == document(), "write it anew: python -m tests.attempts"


def test_every_test_that_the_document_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", OTHERS.read_text())
    assert named
    for file, function in named:
        text = (DOCUMENT.parents[1] / file).read_text()
        assert not function or f"def {function}(" in text, f"{file}::{function}"
