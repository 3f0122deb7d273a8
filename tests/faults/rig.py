"""The rig of the fault suite: a whole service with two workers, a faulty network around it, and a ledger outside of it.

The API and the workers reach Postgres and Valkey through proxies, and have failpoints. What a test asks of Postgres and
Valkey itself goes past the proxies.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import psycopg
import redis
from psycopg.rows import dict_row

from app.devstack.access import make_key
from app.devstack.ports import LOOPBACK, free_port
from app.devstack.processes import Process, Reaper
from app.devstack.stack import Api, Worker
from app.domain.principal import Scope
from tests.faults.failpoints import Failpoint
from tests.faults.ledger import Ledger
from tests.faults.proxy import Proxy
from tests.faults.wire import PostgresWire, RedisWire
from tests.spending import give_budget
from tests.stack import Stack

LEASE_SECONDS = 3
DRAIN_SECONDS = 4
TENANT = "faults"
DAILY_USD = "999999"
"""Its budget: every call is reserved and settled, and none is stopped."""
SCENARIO = "bench:4:0.1"
"""Four replies of 0.1 s; between them a call of each effect: READ, IDEMPOTENT, ONCE."""
AWAKE_SECONDS = 1.0
"""After so long, what a worker was about to do when it was frozen has been done."""
TERMINAL = ("succeeded", "failed", "cancelled")

Row = dict[str, Any]


class _WithFailpoints:
    role: str

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.faults.failpoints", self.role]


class FaultyWorker(_WithFailpoints, Worker):
    role = "worker"


class FaultyApi(_WithFailpoints, Api):
    role = "api"


class Rig(Stack):
    """`worker` and `other` execute; `redis_proxy` and `postgres_proxy` are between them and the servers.

    Webhooks may be sent to `webhook_port`, where nobody listens unless a test does.
    """

    def __init__(self, directory: Path, reaper: Reaper, ledger: Ledger) -> None:
        super().__init__(directory, reaper)
        self.ledger = ledger
        self._failpoints = directory / "failpoints"
        self._failpoints.mkdir()
        self._open = ExitStack()
        self._frozen_at = 0.0
        self.webhook_port = free_port()
        self.worker = FaultyWorker("worker", log=directory / "worker.log", reaper=reaper)
        self.other = FaultyWorker("other", log=directory / "other.log", reaper=reaper)
        self.api = FaultyApi("api", log=directory / "api.log", reaper=reaper)
        self.redis_proxy = Proxy(self.valkey.port, wire=RedisWire)
        self.postgres_proxy = Proxy(self.postgres.port, wire=PostgresWire)

    @property
    def service(self) -> list[Process]:
        return [self.api, *self.workers]

    @property
    def workers(self) -> list[Worker]:
        return [self.worker, self.other]

    @property
    def env(self) -> dict[str, str]:
        return {
            **super().env,
            "DATABASE_URL": self.database_url.replace(f":{self.postgres.port}/", f":{self.postgres_proxy.port}/"),
            "REDIS_URL": self.redis_url.replace(f":{self.valkey.port}/", f":{self.redis_proxy.port}/"),
            "LEDGER_URL": self.ledger.address,
            "FAILPOINTS": str(self._failpoints),
            "LEASE_SECONDS": str(LEASE_SECONDS),
            "DRAIN_SECONDS": str(DRAIN_SECONDS),
            "WORKER_CONCURRENCY": "20",
            "EGRESS_TRUSTED_ORIGINS": f"http://{LOOPBACK}:{self.webhook_port}",
        }

    def start_servers(self) -> None:
        super().start_servers()
        self._open.enter_context(self.redis_proxy)
        self._open.enter_context(self.postgres_proxy)

    def start_service(self) -> None:
        self.other.env = self.env | self.other.own_env
        self.other.spawn()
        super().start_service()
        self.other.wait_ready()
        give_budget(self.database_url, TENANT, DAILY_USD)
        self.client = self._client("submitter", Scope.RUNS_READ, Scope.RUNS_WRITE)
        self.reviewer = self._client("reviewer", Scope.REVIEWS_READ, Scope.REVIEWS_DECIDE)

    def _client(self, name: str, *scopes: Scope) -> httpx.Client:
        key = make_key(self.database_url, tenant=TENANT, name=name, scopes=scopes)
        client = httpx.Client(
            base_url=self.api.address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(10, connect=2),
            trust_env=False,
            verify=False,
        )
        return self._open.enter_context(client)

    def heal(self) -> None:
        """Start again what an earlier fault has ended, or left frozen."""
        everything = [*self.processes, self.other]
        for process in everything:
            if process.is_running:
                process.resume()
            else:
                process.spawn()
        for process in everything:
            process.wait_ready()

    def stop(self) -> None:
        self.other.stop()
        super().stop()
        self._open.close()

    def failpoint(self, name: str) -> Failpoint:
        return Failpoint(self._failpoints, name)

    def process_of(self, pid: int) -> Process:
        """The API or the worker that has this process id."""
        [process] = [process for process in self.service if process.pid == pid]
        return process

    # -- runs

    def submit(self, how_many: int = 1, *, agent: str = "bookkeeper", text: str = SCENARIO) -> list[str]:
        """Submit runs as a client should: with an idempotency key, again and again until it hears a 202. Their ids."""
        return [self._submit_one({"agent": agent, "input": f"{text} {uuid4()}"}) for _ in range(how_many)]

    def _submit_one(self, body: Row, *, seconds: float = 30) -> str:
        until = time.monotonic() + seconds
        headers = {"Idempotency-Key": str(uuid4())}
        while True:
            try:
                response = self.client.post("/v1/runs", json=body, headers=headers)
            except httpx.TransportError:
                status = 0
            else:
                status = response.status_code
                if status == 202:
                    return str(response.json()["id"])
                assert status == 503, response.text
                assert int(response.headers["Retry-After"]) >= 1
            assert time.monotonic() < until, f"not accepted within {seconds:g} s, the last answer was {status}"
            time.sleep(0.1)

    def runs_since(self, moment: datetime) -> list[str]:
        """All runs that Postgres has accepted, whether or not their submitter heard of it."""
        return [str(row["id"]) for row in self.rows("SELECT id FROM runs WHERE created_at > %s ORDER BY id", [moment])]

    def settle(self, runs: Sequence[str], *, seconds: float = 30) -> float:
        """Wait until all have ended, deciding what they ask people: how long that took (seconds)."""
        began = time.monotonic()
        while open_runs := self.open_of(runs):
            waited = time.monotonic() - began
            assert waited < seconds, f"after {seconds:g} s there are still {open_runs}"
            for run_id, status in open_runs.items():
                if status == "waiting":
                    self.decide(run_id)
            time.sleep(0.05)
        return time.monotonic() - began

    def open_of(self, runs: Sequence[str]) -> dict[str, str]:
        """Those that have not ended: id → status."""
        rows = self.rows(
            "SELECT id, status FROM runs WHERE id = ANY(%s::uuid[]) AND NOT status = ANY(%s)",
            [list(runs), list(TERMINAL)],
        )
        return {str(row["id"]): row["status"] for row in rows}

    def rest(self, runs: Sequence[str], *, seconds: float = 30) -> None:
        """Wait until no worker has anything to do with them: all have ended, or wait for a person."""
        self.until(lambda: {"queued", "running"}.isdisjoint(self.open_of(runs).values()), seconds=seconds)

    def decide(self, run_id: str) -> None:
        """Be the reviewer: agree to what needs approval, and find out from the ledger what became of calls in doubt."""
        if any(
            psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED for worker in self.workers if worker.is_running
        ):
            self._frozen_at = time.monotonic()
        for review in self.rows("SELECT * FROM reviews WHERE run_id = %s AND status = 'pending'", [run_id]):
            decision = {"decision": "approve"} if review["kind"] == "approval" else self._settle_doubt(review)
            if decision is None:
                return
            try:
                answer = self.reviewer.post(
                    f"/v1/reviews/{review['id']}/decision", json={**decision, "args_hash": review["args_hash"]}
                )
            except httpx.TransportError:
                return  # the next look tells whether it counted
            assert answer.status_code in (200, 409, 503), answer.text

    def _settle_doubt(self, review: Row) -> dict[str, str] | None:
        """None: while a worker is frozen, nobody can say that the call did not happen."""
        if self.ledger.arrivals("charge")[f"{review['run_id']}:{review['seq']}"] > 0:
            return {"decision": "respond", "response": "happened"}
        return None if time.monotonic() < self._frozen_at + AWAKE_SECONDS else {"decision": "approve"}

    def held_by(self, worker: Process) -> list[str]:
        """The runs that this worker holds."""
        rows = self.rows("SELECT id FROM runs WHERE status = 'running' AND worker LIKE %s", [f"%-{worker.pid}-%"])
        return [str(row["id"]) for row in rows]

    def takeovers(self, runs: Sequence[str]) -> list[float]:
        """Of each lost lease: seconds from the worker's last write to the next claim."""
        rows = self.rows(
            """
            SELECT extract(epoch FROM next_at - before_at) AS seconds FROM (
                SELECT kind, data, lag(at) OVER (PARTITION BY run_id ORDER BY seq) AS before_at,
                       lead(at) OVER (PARTITION BY run_id ORDER BY seq) AS next_at
                FROM audit_events WHERE run_id = ANY(%s::uuid[])
            ) AS events
            WHERE kind = 'run.requeued' AND data ->> 'why' = 'lease expired' AND next_at IS NOT NULL
            """,
            [list(runs)],
        )
        return [float(row["seconds"]) for row in rows]

    # -- past the proxies

    def rows(self, statement: str, parameters: Sequence[object] | Mapping[str, object] = ()) -> list[Row]:
        with psycopg.connect(self.database_url, autocommit=True, row_factory=dict_row) as connection:
            return connection.execute(statement, parameters).fetchall()

    def now(self) -> datetime:
        """Postgres' clock."""
        now: datetime = self.rows("SELECT now()")[0]["now"]
        return now

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.redis_url, decode_responses=True)

    def weather(self, **weather: object) -> None:
        """How the provider does from now on; see `app.devstack.model_server.Weather`."""
        httpx.put(f"{self.model_url}/_weather", json=weather).raise_for_status()

    def verify_audit(self) -> Row:
        """What `agent-service audit verify` says of everything there is, the anchor included."""
        env = {**super().env, **self.sealing_env}
        command = [sys.executable, "-m", "app", "audit", "verify", "--payloads", "--json"]
        found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert found.returncode in (0, 1), found.stderr
        report: Row = json.loads(found.stdout)
        return report

    def asked(self) -> int:
        """How many completions the provider has been asked for."""
        return int(httpx.get(f"{self.model_url}/_asked").json()["asked"])
