"""The whole service on one machine: PostgreSQL, Valkey, a model, the API and a worker, started and stopped in order."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from app.audit.keys import new_private_key_pem, public_key_pem
from app.db.migrate import admit, upgrade
from app.devstack.ports import LOOPBACK
from app.devstack.processes import Process, Reaper, Server, start_together
from app.devstack.servers import SERVICE_USER, Postgres, Valkey
from app.domain.errors import ConfigurationError
from app.webhook_signature import new_signing_key

ROOT = Path(__file__).resolve().parents[2]
DATABASE = "agent_service"


class _PythonServer(Server):
    """A module of ours that answers HTTP on a loopback port."""

    health = "/health/live"
    """A path that answers 200 once it works."""

    def __init__(self, name: str, *, log: Path, reaper: Reaper, port: int | None = None) -> None:
        super().__init__(name, directory=ROOT, log=log, reaper=reaper, port=port)

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def _is_ready(self) -> bool:
        with closing(HTTPConnection(LOOPBACK, self.port, timeout=1.0)) as connection:
            try:
                connection.request("GET", self.health)
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False


class StandInModel(_PythonServer):
    """The stand-in model server."""

    health = "/health"

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "app.devstack.model_server", "--port", str(self.port)]


class Api(_PythonServer):
    @property
    def own_env(self) -> dict[str, str]:
        return {"API_HOST": LOOPBACK, "API_PORT": str(self.port)}

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "app", "api"]


class Worker(_PythonServer):
    """Its port is that of its health probe."""

    @property
    def own_env(self) -> dict[str, str]:
        return {"WORKER_HEALTH_PORT": str(self.port)}

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "worker"]


class Stack:
    """The processes of one service. What is under `directory` belongs to this stack alone.

    `env`: the environment that the API and the worker get, besides what the stack knows itself. The stand-in model
    is part of the stack unless it has an `OPENAI_API_KEY`. The audit is sealed with its `AUDIT_SIGNING_KEY`, webhooks'
    secrets are derived from its `WEBHOOK_SIGNING_KEY`, or from keys of the stack's own.
    `durable`: the data survives a crash of the machine. `api_port`: any free one by default.
    """

    def __init__(
        self,
        directory: Path,
        *,
        reaper: Reaper,
        env: Mapping[str, str],
        durable: bool = True,
        api_port: int | None = None,
    ) -> None:
        self.directory = directory
        self._env = env
        self._reaper = reaper
        directory.mkdir(parents=True, exist_ok=True)
        self.postgres = Postgres(directory / "postgres", reaper=reaper, durable=durable)
        self.valkey = Valkey(directory / "valkey", reaper=reaper, durable=durable)
        self.model: StandInModel | None = None
        if not env.get("OPENAI_API_KEY"):
            self.model = StandInModel("model", log=directory / "model.log", reaper=reaper)
        self.api = Api("api", log=directory / "api.log", reaper=reaper, port=api_port)
        self.worker = Worker("worker", log=directory / "worker.log", reaper=reaper)

    @property
    def processes(self) -> Iterator[Process]:
        """In the order in which they need each other, the servers first."""
        yield from (self.postgres, self.valkey)
        if self.model:
            yield self.model
        yield from (self.api, self.worker)

    @property
    def database_url(self) -> str:
        """As the service's user."""
        return self.postgres.service_url(DATABASE)

    @property
    def owner_url(self) -> str:
        """As the owner, for migrations and erasure."""
        return self.postgres.url(DATABASE)

    @property
    def redis_url(self) -> str:
        return self.valkey.url()

    @property
    def env(self) -> dict[str, str]:
        """The environment of a process of this stack. Known once the servers have been started."""
        webhook_key = self._env.get("WEBHOOK_SIGNING_KEY") or self._own_key("webhook-signing-key", new_signing_key)
        env = {
            **self._env,
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "WEBHOOK_SIGNING_KEY": webhook_key,
        }
        if self.model:
            env |= {"OPENAI_API_KEY": "stand-in", "OPENAI_BASE_URL": f"{self.model.address}/v1"}
        return env

    @property
    def audit_anchor(self) -> Path:
        """Where the worker keeps the audit's checkpoints: always beside the database that they are of."""
        return self.directory / "audit-checkpoints.jsonl"

    @property
    def audit_public_key(self) -> Path:
        """What they are verified with. There once the service has been started."""
        return self.directory / "audit-public-key.pem"

    @property
    def sealing_env(self) -> dict[str, str]:
        """What only a worker is told."""
        pem = self._env.get("AUDIT_SIGNING_KEY") or self._own_key("audit-signing-key.pem", new_private_key_pem)
        try:
            self.audit_public_key.write_text(public_key_pem(pem))
        except ValueError as error:
            raise ConfigurationError(f"AUDIT_SIGNING_KEY is malformed: it {error}") from None
        return {"AUDIT_SIGNING_KEY": pem, "AUDIT_ANCHOR": str(self.audit_anchor)}

    def _own_key(self, name: str, make: Callable[[], str]) -> str:
        file = self.directory / name
        if not file.exists():
            unfinished = file.with_suffix(".new")
            unfinished.touch(mode=0o600)
            unfinished.write_text(make())
            unfinished.rename(file)
        return file.read_text()

    def start(self) -> None:
        """Start everything, on a migrated database.

        Raises `ProcessFailed`; then some of it may be running: call `stop` in any case.
        """
        self.start_servers()
        self.start_service()

    def start_servers(self) -> None:
        """PostgreSQL with a migrated database, Valkey, the stand-in model."""
        start_together(*(process for process in self.processes if process not in (self.api, self.worker)))
        self.postgres.create_service_user()
        upgrade(self.postgres.create_database(DATABASE))
        admit(self.owner_url, SERVICE_USER)

    def start_service(self) -> None:
        """The API and the worker."""
        self.api.env = self.env | self.api.own_env
        self.worker.env = self.env | self.worker.own_env | self.sealing_env
        start_together(self.worker, self.api)

    def another_worker(self, name: str, **env: str) -> Worker:
        """One more worker, not yet started; whoever asks for it stops it."""
        worker = Worker(name, log=self.directory / f"{name}.log", reaper=self._reaper)
        worker.env = self.env | worker.own_env | self.sealing_env | env
        return worker

    def another_api(self, name: str, **env: str) -> Api:
        """One more API, not yet started; whoever asks for it stops it."""
        api = Api(name, log=self.directory / f"{name}.log", reaper=self._reaper)
        api.env = self.env | api.own_env | env
        return api

    def stop_service(self) -> None:
        """The worker first: while it drains, the API still answers."""
        self.worker.stop()
        self.api.stop()

    def stop(self) -> None:
        """Stop everything that runs, in good order."""
        for process in reversed(list(self.processes)):
            process.stop()

    def check(self) -> None:
        """Raises `ProcessFailed` where a part has ended by itself."""
        for process in self.processes:
            if process.exit_code is not None:
                raise process.failed(process.describe_exit())
