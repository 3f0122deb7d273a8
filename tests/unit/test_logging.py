"""What was logged can be read, is nobody else's line, and holds nothing secret or personal."""

import json
import logging
import os
import pty
import subprocess
import sys
import time
from uuid import uuid4

import pytest

from app.devstack.stack import ROOT
from app.logging import _JsonFormatter
from app.redaction import HIDDEN, Redaction

KEY = "ask_0123456789ab_" + "k" * 43
WEBHOOK_SECRET = "whsec_" + "w" * 43 + "="
PROGRAM = """
import logging, sys
from app.logging import bind, configure_logging
text, patterns, *secrets = sys.argv[1:]
configure_logging("info", secrets=secrets, patterns=[patterns] if patterns else [])
with bind(bound=text):
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger(text).exception("said %s", text, extra={"fields": {"field": {"deep": [text]}}})
"""


def logged(text: str, *secrets: str, pattern: str = "", terminal: bool = False) -> str:
    """What a process writes that logs this text in every way there is."""
    return written_by(PROGRAM, text, pattern, *secrets, terminal=terminal)


def written_by(program: str, *arguments: str, terminal: bool = False) -> str:
    """To standard error, by a process that executes this."""
    command = [sys.executable, "-c", program, *arguments]
    if not terminal:
        return subprocess.run(command, cwd=ROOT, check=False, stderr=subprocess.PIPE).stderr.decode()
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as reader:
        subprocess.run(command, cwd=ROOT, check=False, stderr=theirs)
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


PERSONAL = {
    "bob@example.com": "[email]",
    "4111 1111 1111 1111": "[card]",
    "Bearer abcdef1234567890": "Bearer [credential]",
    "CUST-4711": "[redacted]",
}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("text", PERSONAL)
def test_what_is_personal_is_in_no_part_of_a_line(text: str, terminal: bool) -> None:
    lines = logged(f"before {text} behind", pattern=r"CUST-\d+", terminal=terminal)
    assert text not in lines
    assert lines.count(f"before {PERSONAL[text]} behind") >= 5


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


def test_a_line_is_json_also_where_patterns_name_what_json_is_made_of() -> None:
    [line] = logged('a "b" 12, {"c": 1}', pattern=r'["{}:,0-9]+').splitlines()
    assert json.loads(line)["bound"] == "a [redacted]b[redacted] [redacted] [redacted]c[redacted] [redacted]"


LINES_OF_OTHERS = """
import logging, sys, threading, warnings
from app.logging import bind, configure_logging
configure_logging("info")
import langfuse, openai, opentelemetry.sdk.trace, rq.worker, sqlalchemy, uvicorn.config
rq.logutils.setup_loghandlers("WARNING")
class Lost:
    def __del__(self): raise KeyError("bob@example.com")
names = ("uvicorn.error", "sqlalchemy.pool", "rq.worker", "langfuse", "opentelemetry.sdk", "asyncio")
with bind(run_id="r"):
    for name in names:
        logging.getLogger(name).error("to %s", "bob@example.com")
    logging.getLogger("httpx").error("to %s", "bob@example.com")
    logging.getLogger("bad").error("%d of %s", "bob@example.com")
    warnings.warn("to bob@example.com", UserWarning)
    thread = threading.Thread(target=lambda: 1 / 0, name="bob@example.com")
    thread.start()
    thread.join()
    lost = Lost()
    del lost
    raise ValueError("for bob@example.com")
"""


def test_what_libraries_and_python_itself_say_are_lines_of_the_same_form() -> None:
    lines = [json.loads(line) for line in written_by(LINES_OF_OTHERS).splitlines()]
    assert "bob" not in json.dumps(lines)
    by_logger = {line["logger"]: line for line in lines}
    for name in ("uvicorn.error", "sqlalchemy.pool", "rq.worker", "langfuse", "opentelemetry.sdk", "asyncio"):
        assert by_logger[name]["event"] == "to [email]"
        assert by_logger[name]["run_id"] == "r"
    assert len(lines) == len(by_logger) + 2
    assert by_logger["bad"]["event"] == "not a line that can be written: '%d of %s'"
    assert "UserWarning: to [email]" in by_logger["py.warnings"]["event"]
    thread, lost, main = (line for line in lines if line["event"] == "uncaught exception")
    assert "ZeroDivisionError" in thread["exception"]
    assert lost["exception"].endswith("KeyError: '[email]'")
    assert main["exception"].endswith("ValueError: for [email]")


VALUES = r"""
import logging, uuid
from app.logging import configure_logging
configure_logging("info")
class Broken:
    def __str__(self): raise RuntimeError("bob@example.com")
class Worse(Broken):
    __repr__ = Broken.__str__
around = {}
around["self"] = around
log = lambda **fields: logging.getLogger("x").info("e", extra={"fields": fields})
log(a=float("nan"), b=1.5, c=None, d={1: (2, {"a@b.co"})}, e=uuid.UUID(int=1), f=4111111111111111)
log(a=around)
log(a=Broken())
log(a="\ud800")
logging.getLogger("x").info(Worse())
"""


def test_every_value_becomes_json() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in written_by(VALUES).splitlines()]
    id_ = "00000000-0000-0000-0000-000000000001"
    common = {"time": lines[0]["time"], "level": "info", "logger": "x", "event": "e"}
    assert lines[0] == {**common, "a": "nan", "b": 1.5, "d": {"1": [2, ["[email]"]]}, "e": id_, "f": "[card]"}
    assert lines[1]["a"]["self"]["self"]
    assert lines[2]["event"] == "not a line that can be written: 'e'"
    assert lines[2]["error"] == "RuntimeError('[email]')"
    assert lines[3]["a"] == "\ud800"
    assert len(lines) == 4  # nobody can say what the last one was; and logging does not try


LATER = """
import asyncio, logging
from app.logging import about_run, add, bind, configure_logging
from uuid import UUID
configure_logging("info")
log = logging.getLogger("x").info
async def child():
    add(tenant="t")
    log("child")
async def main():
    add(lost=1)
    with bind(request_id="0123456789abcdef"):
        await asyncio.create_task(child())
        with bind(inner=1):
            about_run(UUID(int=1))
            log("inner")
        log("outer")
    log("outside")
asyncio.run(main())
"""


def test_what_is_known_only_later_is_added_to_the_block_and_its_tasks() -> None:
    found = {}
    for line in map(json.loads, written_by(LATER).splitlines()):
        found[line["event"]] = {name: line[name] for name in line if name not in ("time", "level", "logger", "event")}
    request = {"request_id": "0123456789abcdef", "tenant": "t"}
    run = {"run_id": "00000000-0000-0000-0000-000000000001", "trace_id": "0" * 31 + "1"}
    assert found == {"child": request, "inner": {**request, "inner": 1, **run}, "outer": request, "outside": {}}


def test_on_a_terminal_ids_are_short() -> None:
    lines = written_by(LATER, terminal=True).splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "info    x: child request_id=01234567 tenant=t",
        "info    x: inner request_id=01234567 tenant=t inner=1 run_id=00000000-0000-0000-0000-000000000001",
        "info    x: outer request_id=01234567 tenant=t",
        "info    x: outside",
    ]


def test_a_line_costs_next_to_nothing() -> None:
    formatter = _JsonFormatter(Redaction([f"setting-{number}" * 3 for number in range(10)]).hide_personal)
    record = logging.LogRecord("app.api", logging.INFO, "x.py", 1, "request", (), None)
    record.fields = {"method": "GET", "path": "/v1/runs/{run_id}", "status": 200, "duration_ms": 12.5}
    record.bound = {"request_id": "f" * 32, "tenant": "t", "run_id": str(uuid4()), "trace_id": uuid4().hex}
    began = time.process_time()
    for _ in range(2_000):
        formatter.format(record)
    each = (time.process_time() - began) / 2_000
    print(f"{each * 1e6:.1f} \u00b5s a line")
    assert each < 400e-6
