"""Canaries are planted wherever a secret is or may be put by mistake, and looked for wherever anything comes out."""

import json
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import psycopg
import pytest
import redis

from app.devstack.access import make_key
from app.devstack.ports import LOOPBACK
from app.devstack.processes import Reaper
from app.devstack.servers import Valkey
from app.devstack.stack import ROOT
from app.domain.principal import Scope
from tests.api.test_isolation import operations_of
from tests.api.wire import exchange
from tests.indiscreet import INSTRUCTIONS
from tests.otlp import BackEnd, Kind, all_four, receiver, settings_of
from tests.scripts import Run, rest, submit
from tests.stack import Stack, clean_env, new_directory


class LockedValkey(Valkey):
    """A Valkey that wants a password. It is in no argument: those are for everybody to see."""

    password = secrets.token_urlsafe(24)

    @property
    def command(self) -> list[str]:
        file = self.directory / "valkey.conf"
        file.write_text(f"requirepass {self.password}\n")
        program, *options = super().command
        return [program, str(file), *options]

    def url(self, database: int = 0) -> str:
        return f"redis://:{self.password}@{LOOPBACK}:{self.port}/{database}"

    def _is_ready(self) -> bool:
        try:
            with redis.Redis.from_url(self.url(), socket_timeout=1) as client:
                return bool(client.info("server")["process_id"] == self.pid)
        except redis.RedisError:
            return False


class Provider(BaseHTTPRequestHandler):
    """A model provider that quotes the key that it was asked with, as some do, or asks for tools."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = next(message["content"] for message in asked["messages"] if message["role"] == "user")
        is_personal = "be personal" in said
        message: dict[str, object] = {"role": "assistant", "content": "done"}
        if is_personal:
            message["content"] = f"done: {said} {self.headers['Authorization']}"
        if "be rude" in asked["messages"][-1]["content"]:
            why = f"Incorrect API key provided: {self.headers['Authorization']} for {said}"
            return self._answer(
                401, {"error": {"message": why, "type": "authentication_error", "code": "invalid_api_key"}}
            )
        if asked["messages"][-1]["role"] == "user":
            tools = ["repeat", "choke", f"find_{WORD}", "sign"] if is_personal else ["blurt"]
            arguments = json.dumps({"text": said} if is_personal else {})
            calls = [
                {"id": f"call_{tool}", "type": "function", "function": {"name": tool, "arguments": arguments}}
                for tool in tools
            ]
            message = {"role": "assistant", "content": said if is_personal else None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return self._answer(200, {"id": "1", "object": "chat.completion", "choices": [choice]})

    def _answer(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


WORD = f"quixotic{secrets.token_hex(8)}"
EMAIL = f"canary.{secrets.token_hex(8)}@example.com"
CARD = "5555 5555 5555 4444"
CONTENT = f"be personal\nwith {WORD}, {EMAIL} and {CARD}"
"""What somebody sends, and what comes back from model and tools."""

CANARIES = {
    "OPENAI_API_KEY": f"sk-canary-{secrets.token_urlsafe(24)}",
    "WEBHOOK_SIGNING_KEY": f"canary/{secrets.token_urlsafe(32)}+",
}


class CanaryStack(Stack):
    """A service all of whose secrets are known to the test."""

    provider = ""

    def __init__(self, directory: Path, reaper: Reaper) -> None:
        super().__init__(directory, reaper)
        self.valkey = LockedValkey(directory / "valkey", reaper=reaper, durable=False)
        self.model = None
        self.tracing: dict[str, str] = {}

    @property
    def env(self) -> dict[str, str]:
        agents = {
            "AGENTS": "app.agents,tests.indiscreet",
            "LOG_LEVEL": "debug",
            "OPENAI_BASE_URL": f"{self.provider}/v1",
        }
        return super().env | agents | CANARIES | self.tracing

    @property
    def canaries(self) -> dict[str, str]:
        pem = self.sealing_env["AUDIT_SIGNING_KEY"].splitlines()
        tracing = {name: value for name, value in self.tracing.items() if name.endswith(("SECRET_KEY", "API_KEY"))}
        (token,) = re.findall("token-[0-9a-f]+", self.tracing["OTLP_ENDPOINTS"])
        return (
            CANARIES
            | tracing
            | {
                "the token in OTLP_ENDPOINTS": token,
                "AUDIT_SIGNING_KEY": pem[1],
                "the database's password": urlsplit(self.database_url).password or "",
                "the owner's password": urlsplit(self.owner_url).password or "",
                "the Redis password": LockedValkey.password,
            }
        )


@pytest.fixture(scope="module")
def back_ends() -> Iterator[dict[Kind, BackEnd]]:
    with all_four() as four, receiver("collector") as collector:
        yield {**four, "collector": collector}


@pytest.fixture(scope="module")
def service(reaper: Reaper, back_ends: dict[Kind, BackEnd]) -> Iterator[CanaryStack]:
    with HTTPServer((LOOPBACK, 0), Provider) as provider, new_directory() as directory:
        thread = threading.Thread(target=provider.serve_forever)
        thread.start()
        stack = CanaryStack(directory, reaper)
        stack.provider = f"http://{LOOPBACK}:{provider.server_port}"
        stack.tracing = settings_of(back_ends)
        try:
            stack.start()
            yield stack
        finally:
            stack.stop()
            provider.shutdown()
            thread.join()


class Findings:
    """Everything that came out of the service, by where."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []

    def note(self, response: httpx.Response) -> None:
        """For a client's event hook."""
        response.read()
        where = f"{response.request.method} {response.request.url.path} -> {response.status_code}"
        self.texts.append((where, f"{response.headers.raw!r} {response.text}"))

    def leaks(self, canaries: dict[str, str], *, at_least: int = 20) -> list[str]:
        """Where they are. `at_least`: characters, so that none is found by chance."""
        found = []
        for name, canary in canaries.items():
            assert len(canary) >= at_least, name
            forms = {canary, quote(canary, safe=""), json.dumps(canary)[1:-1], canary.encode().hex()}
            found += [f"{name}: {where}" for where, text in self.texts if any(form in text for form in forms)]
        return sorted(set(found))


def rows_in(owner_url: str) -> Iterator[tuple[str, str]]:
    """Every table, as text."""
    with psycopg.connect(owner_url, autocommit=True) as db:
        tables = db.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        for (table,) in tables:
            rows = db.execute(f'SELECT t::text FROM "{table}" t').fetchall()
            yield f"table {table}", "\n".join(row for (row,) in rows)


def keys_in(redis_url: str) -> Iterator[tuple[str, str]]:
    """Every key of Redis with its value, as Redis itself dumps it, and what compressed values hold."""
    with redis.Redis.from_url(redis_url) as client:
        for key in client.scan_iter():
            kind = client.type(key)
            value = {
                b"string": client.get,
                b"hash": client.hgetall,
                b"list": lambda key: client.lrange(key, 0, -1),
                b"set": client.smembers,
                b"zset": lambda key: client.zrange(key, 0, -1),
                b"stream": client.xrange,
            }[kind](key)
            yield f"Redis {key!r}", f"{key!r} {value!r}"


def logs_of(service: CanaryStack) -> Iterator[tuple[str, str]]:
    for process in service.processes:
        yield f"log of {process.name}", process.log.read_text(errors="replace")


def traces_in(back_ends: dict[Kind, BackEnd], run: Run) -> Iterator[tuple[str, str]]:
    """All that a back end is told of a run: spans with their resources, events and states, and scores."""
    for kind, back_end in back_ends.items():
        for span in back_end.until_root(run["id"]):
            yield f"{kind}: {span.name}", repr(span)
    langfuse = back_ends["langfuse"]
    for score in langfuse.until_scores(run["id"], 1):
        yield "langfuse: score", repr(score)


def command_lines(service: CanaryStack) -> Iterator[tuple[str, str]]:
    for process in service.processes:
        for file in ("cmdline", "status", "comm"):
            yield f"{file} of {process.name}", Path(f"/proc/{process.pid}/{file}").read_text()


def put_everywhere(address: str, key: str) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Where callers put their key by mistake."""
    run = {"agent": "support", "input": "x"}
    yield "GET", "/v1/runs", {"headers": {"Authorization": key}}
    yield "GET", "/v1/runs", {"headers": {"Authorization": f"Basic {key}"}}
    yield "GET", "/v1/runs", {"headers": {"Authorization": f"Bearer {key}x"}}
    yield "GET", "/v1/runs", {"headers": {"Authorization": f"Bearer {key}, {key}"}}
    good = {"Authorization": f"Bearer {key}"}
    for headers in ({}, good):
        yield "GET", f"/{key}", {"headers": headers}
        yield "GET", f"/v1/runs/{key}", {"headers": headers}
        yield "GET", f"/v1/runs/{quote(key[:4])}%{ord(key[4]):02x}{key[5:]}", {"headers": headers}
        yield "GET", f"/v1/{key}/runs", {"headers": headers}
        yield "DELETE", f"/v1/runs/{key}", {"headers": headers}
        yield "GET", "/v1/runs", {"headers": headers, "params": {"api_key": key}}
        yield "GET", "/v1/runs", {"headers": headers, "params": {key: "1"}}
        yield "GET", "/v1/runs", {"headers": headers, "params": {"cursor": key}}
        yield "GET", "/v1/runs", {"headers": headers, "params": {"agent": key}}
        yield "GET", "/v1/agents", {"headers": {**headers, "X-Request-Id": key}}
        yield "GET", "/v1/agents", {"headers": {**headers, "Cookie": f"key={key}", "Referer": key, "User-Agent": key}}
        yield "POST", "/v1/runs", {"headers": headers, "json": {**run, key: key}}
        yield "POST", "/v1/runs", {"headers": headers, "json": {**run, "agent": key}}
        yield "POST", "/v1/runs", {"headers": headers, "json": {**run, "limits": {key: 1}}}
        yield "POST", "/v1/runs", {"headers": headers, "json": {**run, "metadata": {key: 1}}}
        yield "POST", "/v1/runs", {"headers": headers, "json": {**run, "priority": key}}
        yield "POST", "/v1/runs", {"headers": headers, "content": key, "json": None}
        yield "POST", "/v1/runs", {"headers": {**headers, "Idempotency-Key": f"{key}\u00e4".encode()}, "json": run}
        yield "POST", "/v1/webhooks", {"headers": headers, "json": {"url": f"https://{key}@example.com/"}}
        yield "POST", "/v1/webhooks", {"headers": headers, "json": {"url": "https://example.com/", "events": [key]}}


def test_no_secret_is_seen_anywhere(service: CanaryStack, back_ends: dict[Kind, BackEnd]) -> None:
    found = Findings()
    key = make_key(service.database_url, tenant="t", name="canary")
    weak = make_key(service.database_url, tenant="t", name="weak", scopes=[Scope.RUNS_WRITE])
    canaries = service.canaries | {f"the secret of a key ({name})": name.split("_", 2)[2] for name in (key, weak)}

    # What callers do, in every way that they may do it wrong; and all there is to ask, with every answer noted.
    hooks = {"response": [found.note]}
    with httpx.Client(base_url=service.api.address, event_hooks=hooks, trust_env=False, timeout=30) as client:
        for wrong in (key, weak):
            for method, path, sent in put_everywhere(service.api.address, wrong):
                client.request(method, path, **{name: value for name, value in sent.items() if value is not None})  # type: ignore[arg-type]
        for answer in exchange(
            service.api, f"GET /{key} \x01 HTTP/1.1\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        ):
            found.texts.append(("not HTTP", f"{answer.headers!r} {answer.body!r}"))

        client.headers["Authorization"] = f"Bearer {key}"
        webhook = httpx.post(
            f"{service.api.address}/v1/webhooks",
            json={"url": "https://webhook.invalid/"},
            headers=client.headers,
            trust_env=False,
        ).json()
        canaries["a webhook's secret"] = webhook.pop("secret")  # of all answers, this one has to tell it
        ids = {"webhook_id": webhook["id"]}

        # What the provider and tools say when they fail.
        rude = rest(client, submit(client, "indiscreet", "be rude"))
        assert rude["stop_reason"] == "model_error"
        blurted = rest(client, submit(client, "indiscreet", "go on"))
        assert blurted["status"] == "succeeded"
        ids["run_id"] = rude["id"]
        bug = client.post("/v1/runs", json={"agent": "outspoken", "input": {"text": "go on"}})
        assert bug.status_code == 500

        # Servers that die in between.
        service.valkey.kill()
        submit(client, "support", "x")
        service.valkey.start()
        service.postgres.kill()
        with suppress(httpx.TransportError):
            assert client.get("/v1/runs").status_code == 503
        client.get("/health")
        time.sleep(2)
        service.postgres.start()
        Stack.until(lambda: client.get("/v1/runs").status_code == 200)

        for operation in operations_of(client.get("/openapi.json").json()):
            if set(operation.parameters) <= set(ids) and operation.method == "GET":
                for run_id in (rude["id"], blurted["id"]):
                    operation.send(client, ids | {"run_id": run_id})

    for run in (rude, blurted):
        found.texts += traces_in(back_ends, run)
    found.texts += wrong_passwords(service)
    found.texts += [
        *logs_of(service),
        *rows_in(service.owner_url),
        *keys_in(service.redis_url),
        *command_lines(service),
    ]
    wheres = " ".join(where for where, _ in found.texts)
    for expected in (
        "langfuse: score",
        "datadog: execute_tool blurt",
        "phoenix: invoke_agent",
        "log of api",
        "log of worker",
        "table runs",
        "Redis b'rq:",
        "GET /metrics",
        "cmdline of api",
    ):
        assert expected in wheres
    assert "unexpected error" in service.api.log.read_text()
    assert "tool crashed" in service.worker.log.read_text()
    assert "Incorrect API key provided" in service.worker.log.read_text()
    assert found.leaks(canaries) == []
    assert found.leaks({"what can be found": rude["id"]}), "this test looks at nothing"


@pytest.mark.parametrize("agent", ["indiscreet", "discreet", "candid"])
def test_a_trace_shows_as_much_of_the_content_as_the_agent_says(
    service: CanaryStack, back_ends: dict[Kind, BackEnd], agent: str
) -> None:
    key = make_key(service.database_url, tenant=agent, name="canary")
    headers = {"Authorization": f"Bearer {key}"}
    metadata = {"user_id": EMAIL, "session_id": WORD, "note": f"{CARD} {WORD}", EMAIL: WORD, WORD: CARD}
    found = Findings()
    with httpx.Client(base_url=service.api.address, headers=headers, trust_env=False, timeout=30) as client:
        rude = rest(client, submit(client, agent, f"{CONTENT}; be rude", metadata=metadata))
        assert rude["stop_reason"] == "model_error"
        run = rest(client, submit(client, agent, CONTENT, metadata=metadata))
        (review,) = client.get("/v1/reviews").json()["data"]
        verdict = {"decision": "approve", "args_hash": review["args_hash"], "reason": CONTENT}
        assert client.post(f"/v1/reviews/{review['id']}/decision", json=verdict).status_code == 200
        done = rest(client, run)
        assert (done["status"], WORD in done["output"]) == ("succeeded", True)
    for each in (rude, done):
        found.texts += traces_in(back_ends, each)
    wheres = {where for where, _ in found.texts}
    assert {"langfuse: execute_tool repeat", "collector: wait for person", "langfuse: score"} <= wheres
    secret = service.canaries | {"the key": key.split("_", 2)[2]}
    assert found.leaks(secret) == []
    content = {"e-mail": EMAIL, "card": CARD, "word": WORD, "instructions": INSTRUCTIONS}
    seen = {leak.partition(":")[0] for leak in found.leaks(content, at_least=len(CARD))}
    assert seen == {"indiscreet": {"word", "instructions"}, "discreet": set(), "candid": set(content)}[agent]
    assert any("[email]" in text and "[card]" in text for _, text in found.texts) is (agent == "indiscreet")

    logs = Findings()
    logs.texts += logs_of(service)
    assert logs.leaks(secret | {"e-mail": EMAIL, "card": CARD}, at_least=len(CARD)) == []
    assert "[email] and [card]" in service.worker.log.read_text()


def wrong_passwords(service: CanaryStack) -> Iterator[tuple[str, str]]:
    """What the commands print that are told a wrong password, itself a canary."""
    wrong = service.canaries["the database's password"][::-1]
    database = f"postgresql://agent_service_login:{wrong}@{LOOPBACK}:{service.postgres.port}/agent_service"
    cases = {
        "migrate": {"DATABASE_URL": database, "OWNER_DATABASE_URL": database},
        "keys list": {"DATABASE_URL": database},
        "audit verify": {"DATABASE_URL": database, "OWNER_DATABASE_URL": database},
        "api": {"DATABASE_URL": database, "REDIS_URL": f"http://:{LockedValkey.password}@{LOOPBACK}"},
        "worker": {"DATABASE_URL": f"mysql://a:{wrong}@{LOOPBACK}/x", "WEBHOOK_SIGNING_KEY": "short"},
    }
    for command, env in cases.items():
        ended = subprocess.run(
            [sys.executable, "-m", "app", *command.split()],
            env=clean_env(**(service.env | env)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode != 0, command
        assert ended.stderr
        assert wrong not in ended.stdout + ended.stderr, command
        yield f"output of {command}", ended.stdout + ended.stderr
