"""Child processes: each in a session of its own, with a log file, and a reaper that outlives us."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from app.devstack import reaper
from app.devstack.ports import free_port
from app.devstack.terminal import readable

_POLL_SECONDS = 0.02


class ProcessFailed(Exception):
    """A part of the stack did not start, or ended by itself. The message says which, and ends with its last output."""


class Reaper:
    """Our end of the reaper: what has been told to it is stopped when this process dies, however it dies.

    `keep_open`: a file descriptor that the reaper holds as well, so that a lock on it outlives us until all is reaped.
    """

    def __init__(self, *, keep_open: int | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__],
            stdin=subprocess.PIPE,
            start_new_session=True,
            pass_fds=() if keep_open is None else (keep_open,),
        )

    def adopt(self, pid: int, stop_signal: int) -> None:
        self._tell(f"+{pid} {stop_signal:d}\n")

    def release(self, pid: int) -> None:
        self._tell(f"-{pid}\n")

    def close(self) -> None:
        """Let it end. What was not released is stopped."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        # Where somebody has killed the reaper, the supervisor still stops everything that it can stop itself.
        with contextlib.suppress(BrokenPipeError):
            self._input.write(line.encode())
            self._input.flush()

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Process(ABC):
    """One child process. It may be started again after it has stopped, was killed, or died.

    `directory`: where it works. `log`: its output goes there, begun anew by the first start. `env`: its whole
    environment; None means ours. `run_as`: numeric user and group; None means ours. `was_started`: the log is of now.
    """

    stop_signal = signal.SIGTERM
    """Asks it to stop in good order."""
    stop_seconds = 15.0
    """How long that may take before it is killed."""
    ready_seconds = 30.0
    """How long it may take until it can be used."""

    def __init__(
        self,
        name: str,
        *,
        directory: Path,
        log: Path,
        reaper: Reaper,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.directory = directory
        self.run_as: tuple[int, int] | None = None
        self.env = env
        self._reaper = reaper
        self._popen: subprocess.Popen[bytes] | None = None
        self.was_started = False
        self._begins_at = 0

    @property
    @abstractmethod
    def command(self) -> Sequence[str]:
        """Program and arguments."""

    def _prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """What has to be there before it is started."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Can it be used? Asked again and again after the start."""

    @property
    def pid(self) -> int:
        """Process id. Raises `ProcessFailed` where it was not started."""
        if self._popen is None:
            raise ProcessFailed(f"{self.name} is not running")
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How it ended by itself; None while it runs, and after we stopped it."""
        return self._popen.poll() if self._popen else None

    def start(self) -> None:
        """Start it and wait until it can be used.

        Raises `ProcessFailed`; then it is not running.
        """
        try:
            self.spawn()
            self.wait_ready()
        except BaseException:
            self.kill()
            raise

    def spawn(self) -> None:
        """Start it, and do not wait.

        Raises `ProcessFailed` where it runs already, or what it needs is not there.
        """
        if self.is_running:
            raise ProcessFailed(f"{self.name} is running already")
        self.kill()  # what one that died has left
        self._prepare()
        user, group = self.run_as or (None, None)
        with self.log.open("ab" if self.was_started else "wb") as log:
            self._begins_at = log.seek(0, os.SEEK_END)
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.directory,
                start_new_session=True,
                user=user,
                group=group,
                extra_groups=None if user is None else (),
            )
        self._reaper.adopt(self._popen.pid, self.stop_signal)
        self.was_started = True

    def wait_ready(self) -> None:
        """Wait until it can be used.

        Raises `ProcessFailed` where it ends before that, or takes longer than `ready_seconds`.
        """
        until = time.monotonic() + self.ready_seconds
        while not self._is_ready():
            if not self.is_running:
                raise self.failed(f"{self.describe_exit()} before it was ready")
            if time.monotonic() > until:
                raise self.failed(f"was not ready after {self.ready_seconds:g} s")
            time.sleep(_POLL_SECONDS)

    def stop(self, stop_signal: int | None = None) -> None:
        """Ask it to stop, by its own signal or another, and wait; one that takes too long is killed."""
        self.signal(self.stop_signal if stop_signal is None else stop_signal)
        self.signal(signal.SIGCONT)  # one that was paused would not hear the other
        self._wait_gone(self.stop_seconds)

    def kill(self) -> None:
        """End it at once, as a crash would: SIGKILL."""
        self._wait_gone(0)

    def wait(self, seconds: float) -> int:
        """Wait until it ends by itself, and return its exit code.

        Raises `ProcessFailed` where it is still there after that time.
        """
        assert self._popen is not None
        try:
            code = self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise self.failed(f"has not ended after {seconds:g} s") from None
        self.kill()
        return code

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: it holds on to everything and answers nothing."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def signal(self, number: int) -> None:
        """Send a signal to the process; nothing happens where it has ended."""
        if self._popen is not None:
            self._popen.send_signal(number)

    def tail(self, lines: int = 20) -> str:
        """The end of what it has written since it was last started."""
        with self.log.open("rb") as file:
            file.seek(self._begins_at)
            written = file.read().decode(errors="replace").rstrip()
        return "\n".join(readable(line) for line in written.splitlines()[-lines:])

    def failed(self, what: str) -> ProcessFailed:
        """An error that says what happened to this process, with the end of its log."""
        output = self.tail()
        return ProcessFailed(
            f"{self.name} {what}" + (f"; its last output:\n{output}" if output else ", and said nothing")
        )

    def describe_exit(self) -> str:
        """How it ended, in words."""
        code = self.exit_code
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def _wait_gone(self, seconds: float) -> None:
        if self._popen is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        reaper.send(self._popen.pid, signal.SIGKILL)  # the whole group: also what it has started
        self._popen.wait()
        self._reaper.release(self._popen.pid)
        self._popen = None


class Server(Process):
    """A child process that listens on one loopback port, and keeps it from start to start."""

    def __init__(
        self,
        name: str,
        *,
        directory: Path,
        log: Path,
        reaper: Reaper,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        super().__init__(name, directory=directory, log=log, reaper=reaper, env=env)
        self.port = port or free_port()


def start_together(*processes: Process) -> None:
    """Start several that do not need each other, and wait until all can be used.

    Raises `ProcessFailed`; then some of them may be running.
    """
    for process in processes:
        process.spawn()
    for process in processes:
        process.wait_ready()
