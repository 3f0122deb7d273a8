"""What was logged can be read, is nobody else's line, and holds no secret."""

import json
import os
import pty
import subprocess
import sys
import time

import pytest

from app.devstack.stack import ROOT
from app.logging import HIDDEN, Redaction, without_secrets

KEY = "ask_0123456789ab_" + "k" * 43
WEBHOOK_SECRET = "whsec_" + "w" * 43 + "="
PROGRAM = """
import logging, sys
from app.logging import bind, configure_logging
configure_logging("info", secrets=sys.argv[2:])
text = sys.argv[1]
with bind(bound=text):
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger(text).exception("said %s", text, extra={"fields": {"field": {"deep": [text]}}})
"""


def logged(text: str, *secrets: str, terminal: bool = False) -> str:
    """What a process writes that logs this text in every way there is."""
    command = [sys.executable, "-c", PROGRAM, text, *secrets]
    if not terminal:
        return subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.PIPE).stderr.decode()
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as reader:
        subprocess.run(command, cwd=ROOT, check=True, stderr=theirs)
        os.close(theirs)
        written = b""
        try:
            while part := reader.read(65_536):
                written += part
        except OSError:  # nobody has the other end any more
            pass
    return written.decode().replace("\r\n", "\n")


SECRETS = {
    "an API key": KEY,
    "a webhook's secret": WEBHOOK_SECRET,
    "a setting": "provider-key-1234567890",
    "a setting with quotes": 'quoted"back\\slash/1234567890',
    "a setting that is not ASCII": "schl\u00fcssel-1234567890",
    "a setting of several lines": "-----BEGIN-----\nAAAAAAAAAAAAAAAA\nBBBBBBBBBBBBBBBB\n-----END-----",
}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_in_no_part_of_a_line(name: str, terminal: bool) -> None:
    secret = SECRETS[name]
    is_setting = name.startswith("a setting")
    text = logged(f"before {secret} behind", *([secret] if is_setting else []), terminal=terminal)
    for line in secret.split("\n"):
        for form in (line, json.dumps(line)[1:-1], json.dumps(line, ensure_ascii=False)[1:-1]):
            assert form not in text
    assert text.count(HIDDEN) >= 5
    assert "before" in text
    assert "behind" in text


def test_a_password_in_an_address_is_hidden_and_the_rest_is_not() -> None:
    text = "cannot reach postgresql://service:hunter2%40@db.internal:5432/name?x=1, nor redis://:pw@cache:6379/0"
    assert without_secrets(text) == (
        f"cannot reach postgresql://{HIDDEN}@db.internal:5432/name?x=1, nor redis://{HIDDEN}@cache:6379/0"
    )


def test_what_is_no_secret_stays() -> None:
    for text in (
        "task_0123456789ab is asked",
        "https://example.com:8080/a@b",
        'see "https://example.com", "b@example.com"',
        "ask_ whsec_ ask_short",
    ):
        assert without_secrets(text) == text
    assert Redaction(["short"])("a short word") == "a short word"


def test_lines_stay_json_whatever_is_hidden_in_them() -> None:
    [line] = logged(f'{KEY}" {WEBHOOK_SECRET}\\" a://b:c","d":"e@f\n\x9b\u2028\u202e').splitlines()
    fields = json.loads(line)
    assert fields["bound"].startswith(f'{HIDDEN}" {HIDDEN}')
    assert fields["field"]["deep"] == [fields["bound"]]
    assert fields["bound"].endswith("\n\x9b\u2028\u202e")


def test_a_terminal_is_shown_no_command_and_no_line_that_is_not_ours() -> None:
    nasty = "a\r\n12:00:00 info    app: forged\x1b[2J\x07\x9b31m\u202e\u2028\u200bb"
    text = logged(nasty, terminal=True)
    assert not set("\r\x1b\x07\x9b\u202e\u2028\u200b") & set(text)
    first, *others = text.splitlines()
    assert "\\u000d\\u000a12:00:00 info    app: forged\\u001b[2J" in first
    assert others
    assert all(line.startswith("  ") for line in others)


def test_looking_for_secrets_costs_next_to_nothing() -> None:
    redact = Redaction(SECRETS.values())
    line = json.dumps({"event": "request", "request_id": "f" * 32, "path": "/v1/runs/{run_id}", "more": "x" * 200})
    began = time.perf_counter()
    for _ in range(10_000):
        redact(line)
    each = (time.perf_counter() - began) / 10_000
    print(f"{each * 1e6:.1f} \u00b5s a line")
    assert each < 50e-6
