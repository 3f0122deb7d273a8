"""The smoke test of deployments, against a real stack: what it finds, what it prints, and its exit codes."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from app.devstack.access import make_key
from app.devstack.ports import free_port
from app.devstack.stack import Api
from app.domain.principal import Scope
from tests.stack import Stack

SMOKE = Path(__file__).resolve().parents[1] / "deploy" / "smoke.py"
DIGEST = f"sha256:{'1f' * 32}"
OTHER_DIGEST = f"sha256:{'2e' * 32}"
REQUEST_ID = "[0-9a-f]{32}"
RUN_ID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"

Result = subprocess.CompletedProcess[str]


def smoke(*arguments: str, key: str) -> Result:
    """As on a machine without the service: nothing but Python's own library, and no environment but the key."""
    command = [sys.executable, "-I", "-S", str(SMOKE), *arguments]
    env = {"AGENT_SERVICE_KEY": key, "PATH": os.environ["PATH"]}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def _staged(servers: Stack) -> Iterator[Api]:
    api = servers.another_api("staged-api", IMAGE_DIGEST=DIGEST, GIT_REVISION="f00ba4", ENVIRONMENT="staging")
    api.start()
    yield api
    api.stop()


@pytest.fixture
def url(stack: Stack, _staged: Api) -> str:
    """An API that runs an image; the worker behind it runs none."""
    return _staged.address


@pytest.fixture
def key(stack: Stack, tenant: str) -> str:
    return make_key(stack.database_url, tenant=tenant, name="smoke", scopes=[Scope.RUNS_READ, Scope.RUNS_WRITE])


@contextmanager
def weather(stack: Stack, fault: str) -> Iterator[None]:
    """The model provider has a bad day."""
    at = f"{stack.model_url}/_weather"
    httpx.put(at, json={"share": 1, "faults": [fault]})
    try:
        yield
    finally:
        httpx.put(at, json={})


@contextmanager
def balancer(url: str, *first: tuple[int, str]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Something in front of the API that gives answers of its own first.

    Its address, and what it was asked: method and path, and the idempotency key.
    """
    answers, asked = list(first), list[tuple[str, str]]()
    api = httpx.URL(url)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            asked.append((f"{self.command} {self.path}", self.headers.get("Idempotency-Key", "")))
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if answers:
                status, text = answers.pop(0)
                body, request_id = text.encode(), ""
            else:
                connection = HTTPConnection(api.host, api.port or 80, timeout=10)
                connection.request(self.command, self.path, content, dict(self.headers))
                response = connection.getresponse()
                status, body, request_id = response.status, response.read(), response.getheader("X-Request-Id", "")
                connection.close()
            self.send_response(status)
            self.send_header("Location", f"{url}/version")
            self.send_header("X-Request-Id", request_id)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


# -- a good deployment


def test_a_service_that_works_passes_with_a_line_a_step(url: str, key: str) -> None:
    result = smoke(url, "--digest", DIGEST, "--environment", "staging", key=key)
    assert (result.returncode, result.stderr) == (0, "")
    ready, version, submitted, succeeded, passed = result.stdout.splitlines()
    assert re.fullmatch(r"smoke: ready      ok after \d\.\d s: postgres ok, schema ok, redis ok", ready)
    assert version == f"smoke: version    {DIGEST} in staging, commit f00ba4"
    assert re.fullmatch(rf"smoke: submitted  run {RUN_ID} of support, request {REQUEST_ID}", submitted)
    assert re.fullmatch(
        r"smoke: succeeded  \d+\.\d s, of which \d+\.\d s queued; attempt 1;"
        r" \d model calls, \d+ tokens, [\d.]+ US dollars",
        succeeded,
    )
    assert passed == f"smoke: passed     {url}"


def test_the_run_can_be_found_by_the_id_and_the_request_that_were_printed(url: str, key: str) -> None:
    line = smoke(url, "--digest", DIGEST, "--input", "Do you ship to Norway?", key=key).stdout.splitlines()[2]
    found = re.search(rf"run ({RUN_ID}) ", line)
    assert found
    run = httpx.get(f"{url}/v1/runs/{found[1]}", headers={"Authorization": f"Bearer {key}"}).json()
    assert run["input"] == "Do you ship to Norway?"
    assert run["metadata"] == {"purpose": "smoke test"}


def test_a_service_that_is_still_starting_is_waited_for(stack: Stack, key: str) -> None:
    late = stack.another_api("late-api", IMAGE_DIGEST=DIGEST)
    starting = threading.Timer(1, late.start)
    starting.start()
    try:
        result = smoke(late.address, "--digest", DIGEST, key=key)
    finally:
        starting.join()
        late.stop()
    assert result.returncode == 0, result.stderr


def test_what_passes_is_waited_for_and_the_run_is_submitted_once(url: str, key: str) -> None:
    no_back_end = (404, "<h1>Not found</h1>")
    old = (200, json.dumps({"image_digest": OTHER_DIGEST, "environment": "staging"}))
    ready = (200, json.dumps({"status": "ok", "parts": {}}))
    new = (200, json.dumps({"image_digest": DIGEST, "environment": "staging"}))
    busy = (503, json.dumps({"title": "Unavailable"}))
    with balancer(url, no_back_end, ready, old, new, busy) as (address, asked):
        result = smoke(address, "--digest", DIGEST, key=key)
    assert result.returncode == 0, result.stderr
    submitted = [once for what, once in asked if what == "POST /v1/runs"]
    assert len(submitted) == 2
    assert len(set(submitted)) == 1
    assert submitted[0]


def test_the_image_of_the_worker_is_looked_at_where_that_is_asked_for(stack: Stack, url: str, tenant: str) -> None:
    scopes = [Scope.RUNS_READ, Scope.RUNS_WRITE, Scope.AUDIT_READ]
    key = make_key(stack.database_url, tenant=tenant, name="smoke", scopes=scopes)
    old = smoke(url, "--digest", DIGEST, "--worker-too", key=key)
    assert old.returncode == 1
    assert re.search(rf"smoke: FAILED     run {RUN_ID} was executed by the image unknown, not {DIGEST}$", old.stderr)

    stack.worker.stop()
    worker = stack.another_worker("staged-worker", IMAGE_DIGEST=DIGEST)
    worker.start()
    try:
        new = smoke(url, "--digest", DIGEST, "--worker-too", key=key)
    finally:
        worker.stop()
    assert new.returncode == 0, new.stderr
    assert f"smoke: worker     {DIGEST}\n" in new.stdout


# -- one that does not do what it should


def test_another_image_fails(url: str, key: str) -> None:
    result = smoke(url, "--digest", OTHER_DIGEST, "--seconds", "2", key=key)
    assert result.returncode == 1
    assert f"smoke: FAILED     /version: the image is {DIGEST}, not {OTHER_DIGEST}, and" in result.stderr
    assert "submitted" not in result.stdout


def test_another_environment_fails_at_once(url: str, key: str) -> None:
    result = smoke(url, "--digest", DIGEST, "--environment", "production", key=key)
    assert result.returncode == 1
    assert result.stderr == "smoke: FAILED     /version: the environment is 'staging', not 'production'\n"


def test_a_service_that_never_answers_fails_within_the_time(key: str) -> None:
    start = time.monotonic()
    result = smoke(f"http://127.0.0.1:{free_port()}", "--digest", DIGEST, "--seconds", "2", key=key)
    assert result.returncode == 1
    assert re.fullmatch(r"smoke: FAILED     /health/ready does not answer: .*refused.*\n", result.stderr)
    assert time.monotonic() - start < 5


def test_a_run_that_fails_is_shown_with_why_and_where_to_look(stack: Stack, url: str, key: str) -> None:
    with weather(stack, "status:401"):
        result = smoke(url, "--digest", DIGEST, key=key)
    assert result.returncode == 1
    assert re.fullmatch(
        rf"smoke: FAILED     run {RUN_ID} of support is failed: stop reason model_error, error '[^']+', attempt 1,"
        rf" request {REQUEST_ID}\n",
        result.stderr,
    )


def test_a_run_that_waits_for_a_person_fails_at_once(url: str, key: str) -> None:
    question = "The teapot from my order A-1001 arrived with a broken spout. Please refund it."
    result = smoke(url, "--digest", DIGEST, "--input", question, key=key)
    assert result.returncode == 1
    assert re.search(rf"run {RUN_ID} of support is waiting: stop reason None", result.stderr)


def test_a_run_that_does_not_end_fails_within_the_time(stack: Stack, url: str, key: str) -> None:
    with weather(stack, "stall"):
        result = smoke(url, "--digest", DIGEST, "--seconds", "3", key=key)
    assert result.returncode == 1
    assert re.search(rf"run {RUN_ID} is (queued|running), request {REQUEST_ID}, and the time is up", result.stderr)


def test_a_refusal_is_shown_and_not_repeated(url: str, key: str) -> None:
    with balancer(url) as (address, asked):
        result = smoke(address, "--digest", DIGEST, "--agent", "nobody", key=key)
    assert result.returncode == 1
    assert re.search(r"smoke: FAILED     /v1/runs: status 422, No such agent: .*, request [0-9a-f]{32}$", result.stderr)
    assert len([what for what, _ in asked if what == "POST /v1/runs"]) == 1


def test_a_key_that_is_refused_fails_at_once(url: str) -> None:
    result = smoke(url, "--digest", DIGEST, key="as_000000_nobodys")
    assert result.returncode == 1
    assert re.search(r"smoke: FAILED     /v1/runs: status 401, ", result.stderr)


# -- the key


def test_the_key_is_never_printed_whoever_sends_it_back(url: str, key: str) -> None:
    echo = (200, json.dumps({"status": key, "parts": {}}))
    version = (200, json.dumps({"image_digest": DIGEST, "environment": key}))
    refusal = (422, json.dumps({"title": "Refused", "detail": f"Bearer {key}\x1b[2J"}))
    with balancer(url, echo, version, refusal) as (address, _):
        result = smoke(address, "--digest", DIGEST, key=key)
    assert result.returncode == 1
    assert key not in result.stdout + result.stderr
    assert "smoke: ready      [key] after" in result.stdout
    assert "Bearer [key]?[2J" in result.stderr


def test_a_redirect_is_not_followed(url: str, key: str) -> None:
    moved = (307, json.dumps({"title": "Moved"}))
    ready = (200, json.dumps({"status": "ok", "parts": {}}))
    with balancer(url, ready, moved) as (address, asked):
        result = smoke(address, "--digest", DIGEST, key=key)
    assert result.returncode == 1
    assert result.stderr == "smoke: FAILED     /version: status 307, Moved\n"
    assert len(asked) == 2


# -- wrong usage


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "arguments are required: URL, --digest"),
        (["http://127.0.0.1:8000"], "arguments are required: --digest"),
        (["agents.example.com", "--digest", DIGEST], "is not an address"),
        (["ftp://agents.example.com", "--digest", DIGEST], "is not an address"),
        (["https://somebody:secret@agents.example.com", "--digest", DIGEST], "is not an address"),
        (["http://127.0.0.1:8000", "--digest", "latest"], "is not a digest"),
        (["http://127.0.0.1:8000", "--digest", DIGEST[:-1]], "is not a digest"),
        (["http://127.0.0.1:8000", "--digest", f"agent-service@{DIGEST}"], "is not a digest"),
        (["http://127.0.0.1:8000", "--digest", DIGEST, "--seconds", "0"], "is not a number of seconds"),
        (["http://127.0.0.1:8000", "--digest", DIGEST, "--seconds", "nan"], "is not a number of seconds"),
        (["http://127.0.0.1:8000", "--digest", DIGEST, "--seconds", "soon"], "is not a number of seconds"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], why: str) -> None:
    result = smoke(*arguments, key=f"as_{uuid4().hex}")
    assert result.returncode == 2
    assert why in result.stderr


@pytest.mark.parametrize(("key", "why"), [("", "set AGENT_SERVICE_KEY"), ("two words", "does not hold an API key")])
def test_without_a_key_it_says_so(key: str, why: str) -> None:
    result = smoke("http://127.0.0.1:8000", "--digest", DIGEST, key=key)
    assert result.returncode == 2
    assert why in result.stderr
    assert "two words" not in result.stderr
