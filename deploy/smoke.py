#!/usr/bin/env python3
"""The smoke test of every target: does a deployed service run this image, and does a run succeed on it?

    AGENT_SERVICE_KEY=… python3 deploy/smoke.py https://agents.example.com --digest sha256:…

Asks /health/ready until it agrees, /version for the digest, submits one run and waits for it. Exit code 0: all of that
held; 1: it did not; 2: wrong usage. Needs nothing but Python 3.11, because it runs where the service is not installed.
"""

import argparse
import json
import os
import re
import ssl
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, NamedTuple, NoReturn
from urllib.parse import SplitResult, urlsplit

KEY_VARIABLE = "AGENT_SERVICE_KEY"
QUESTION = "How long do I have to send something back?"
PAUSE_SECONDS = 0.5
PATIENCE_SECONDS = 10.0
"""How long one answer may take; the whole test takes no longer than `--seconds`."""
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Answers of a service that is starting or busy: the same request may be answered well a moment later."""
AT_REST = {"succeeded", "failed", "cancelled", "waiting"}
"""A run that waits for a person does not go on by itself either."""


class Failed(Exception):
    """The service does not do what it should; the message says what it did instead."""


class NotYet(Exception):
    """It may do so in a moment; the message says what is wrong so far."""


class Answer(NamedTuple):
    """`request_id`: under which the service's log has it."""

    status: int
    document: dict[str, Any]
    request_id: str

    def __str__(self) -> str:
        about = ": ".join(str(self.document[name]) for name in ("title", "detail") if self.document.get(name))
        return ", ".join(
            filter(None, (f"status {self.status}", about, self.request_id and f"request {self.request_id}"))
        )


class Service:
    """The API at `url`, asked in the name of `key`, until `seconds` have passed.

    Redirects are not followed, and no proxy is asked: the key is for this address alone.
    """

    def __init__(self, url: SplitResult, key: str, *, seconds: float) -> None:
        self._url = url
        self._key = key
        self._until = time.monotonic() + seconds

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """One answer, whatever it is. Raises `NotYet` where there is none."""
        content = json.dumps(body) if body is not None else None
        sent = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json", **headers}
        try:
            with closing(self._connection()) as connection:
                connection.request(method, self._url.path.rstrip("/") + path, content, sent)
                response = connection.getresponse()
                text = response.read()
        except (OSError, HTTPException) as error:
            raise NotYet(f"{path} does not answer: {error or type(error).__name__}") from None
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise NotYet(f"what answers at {path} is not this service's API (status {response.status})")
        return Answer(response.status, document, response.getheader("X-Request-Id", ""))

    def demand(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """A good answer. Raises `NotYet`, or `Failed` where asking again would not help."""
        answer = self.ask(method, path, body, **headers)
        if answer.status in PASSING:
            raise NotYet(f"{path}: {answer}")
        if answer.status >= 300:
            raise Failed(f"{path}: {answer}")
        return answer

    def until(self, attempt: Callable[[], Answer]) -> Answer:
        """What the attempt gives when it no longer raises `NotYet`. Raises `Failed` when the time is up."""
        while True:
            try:
                return attempt()
            except NotYet as reason:
                if time.monotonic() + PAUSE_SECONDS >= self._until:
                    raise Failed(f"{reason}, and the time is up (--seconds)") from None
            time.sleep(PAUSE_SECONDS)

    def _connection(self) -> HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        timeout = max(0.1, min(PATIENCE_SECONDS, self._until - time.monotonic()))
        if self._url.scheme == "https":
            return HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
        return HTTPConnection(host, port, timeout=timeout)


def smoke(service: Service, options: argparse.Namespace) -> None:
    """The steps, in order. Raises `Failed`."""
    start = time.monotonic()
    health = service.until(lambda: _ready(service)).document
    parts = ", ".join(f"{name} {part.get('status')}" for name, part in health.get("parts", {}).items())
    say("ready", f"{health.get('status')} after {time.monotonic() - start:.1f} s: {parts}")
    version = service.until(lambda: _version(service, options.digest)).document
    environment = version.get("environment")
    say("version", f"{version.get('image_digest')} in {environment}, commit {version.get('git_revision') or 'unknown'}")
    if options.environment not in (None, environment):
        raise Failed(f"/version: the environment is {environment!r}, not {options.environment!r}")
    run = _run(service, options.agent, options.input)
    if options.worker_too:
        _check_worker(service, str(run["id"]), options.digest)


def _ready(service: Service) -> Answer:
    """Whatever else answers, such as a load balancer without a back end, may go away."""
    answer = service.ask("GET", "/health/ready")
    if answer.status != 200:
        raise NotYet(f"/health/ready: {answer}")
    return answer


def _version(service: Service, digest: str) -> Answer:
    """For a moment after a switch, an instance of the old image may still answer."""
    answer = service.demand("GET", "/version")
    image = answer.document.get("image_digest")
    if image != digest:
        raise NotYet(f"/version: the image is {image or 'unknown'}, not {digest}")
    return answer


def _run(service: Service, agent: str, question: str) -> dict[str, Any]:
    """The run that was submitted, succeeded."""
    # One key for all attempts: however often it has to be sent, it is one run.
    once = {"Idempotency-Key": f"smoke-{uuid.uuid4()}"}
    body = {"agent": agent, "input": question, "metadata": {"purpose": "smoke test"}}
    accepted = service.until(lambda: service.demand("POST", "/v1/runs", body, **once))
    run_id, request = accepted.document.get("id"), f"request {accepted.request_id}"
    say("submitted", f"run {run_id} of {agent}, {request}")

    def at_rest() -> Answer:
        answer = service.demand("GET", f"/v1/runs/{run_id}")
        status = answer.document.get("status")
        if status not in AT_REST:
            raise NotYet(f"run {run_id} is {status}, {request}{_traces(answer.document)}")
        return answer

    run = service.until(at_rest).document
    if run["status"] != "succeeded":
        raise Failed(
            f"run {run_id} of {agent} is {run['status']}: stop reason {run.get('stop_reason')}, error"
            f" {run.get('error')!r}, attempt {run.get('attempt')}, {request}{_traces(run)}"
        )
    say("succeeded", _account(run))
    return run


def _check_worker(service: Service, run_id: str, digest: str) -> None:
    """/version is the API's; which image executed the run is in the run's audit."""
    audit = service.until(lambda: service.demand("GET", f"/v1/runs/{run_id}/audit")).document
    images = [event["data"].get("image_digest") for event in audit["data"] if event["kind"] == "run.claimed"]
    image = images[-1] if images else ""
    if image != digest:
        raise Failed(f"run {run_id} was executed by the image {image or 'unknown'}, not {digest}")
    say("worker", image)


def _account(run: Mapping[str, Any]) -> str:
    """What the run was."""
    usage = run.get("usage") or {}
    latency = usage.get("latency_ms") or {}
    took = f"{latency.get('total', 0) / 1000:.1f} s, of which {latency.get('queued', 0) / 1000:.1f} s queued"
    tokens = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
    cost = f"{usage['cost_usd']} US dollars" if usage.get("cost_usd") is not None else "unknown cost"
    work = f"{usage.get('model_calls')} model calls, {tokens} tokens, {cost}"
    return f"{took}; attempt {run.get('attempt')}; {work}{_traces(run)}"


def _traces(run: Mapping[str, Any]) -> str:
    return "".join(f"; {name}: {url}" for name, url in (run.get("traces") or {}).items())


def say(step: str, what: str, *, to: Any = None) -> None:
    """One line, without the key, whoever has put it there, and nothing that a terminal would obey."""
    line = f"smoke: {step:<10} {what}".replace(os.environ.get(KEY_VARIABLE, "").strip() or "\0", "[key]")
    print("".join(c if c.isprintable() else "?" for c in line), file=to or sys.stdout, flush=True)


def _address(text: str) -> SplitResult:
    try:
        url = urlsplit(text)
        is_one = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
    except ValueError:
        is_one = False
    if not is_one or not text.isascii() or not text.isprintable() or any(mark in text for mark in " ?#@"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an address like https://agents.example.com")
    return url


def _digest(text: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a digest: sha256: and 64 hexadecimal digits")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, up to 3600")
    return seconds


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smoke.py", description="Does the service at URL run this image, and does a run succeed on it?"
    )
    parser.add_argument("url", metavar="URL", type=_address, help="where the API is")
    parser.add_argument("--digest", required=True, type=_digest, help="that /version has to show: sha256:…")
    parser.add_argument("--environment", help="that /version has to show: staging, production")
    parser.add_argument("--agent", default="support", help="that is asked (default: %(default)s)")
    parser.add_argument("--input", default=QUESTION, metavar="TEXT", help="what it is asked (default: %(default)s)")
    parser.add_argument("--seconds", default=60.0, type=_seconds, help="for all of it (default: %(default)g)")
    parser.add_argument(
        "--worker-too",
        action="store_true",
        help="the worker that executed the run has to run this image too; the key needs the scope audit:read",
    )
    return parser


def main() -> NoReturn:
    parser = _options()
    options = parser.parse_args()
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        parser.error(f"set {KEY_VARIABLE} to an API key with the scopes runs:read and runs:write")
    if not key.isascii() or not key.isprintable() or " " in key:
        parser.error(f"{KEY_VARIABLE} does not hold an API key")
    try:
        smoke(Service(options.url, key, seconds=options.seconds), options)
    except Failed as failure:
        say("FAILED", str(failure), to=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        say("FAILED", "interrupted", to=sys.stderr)
        sys.exit(130)
    say("passed", options.url.geturl())
    sys.exit(0)


if __name__ == "__main__":
    main()
