"""Failpoints: named places between two effects at which a test kills or freezes the process.

In the service a failpoint is a comment, `# failpoint: after_claim`, and nothing else: what ships has no trace of it. A
process of the fault suite is started through this module, which loads `app` and `worker` with each such comment turned
into a call of `reach` (etcd's gofail does the same to Go's comments).

    FAILPOINTS=directory python -m tests.faults.failpoints worker
"""

import importlib.abc
import importlib.machinery
import os
import re
import runpy
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from app.devstack.stack import ROOT

_MARK = re.compile(rb"^( *)# failpoint: (\w+)$", re.MULTILINE)
_CALL = rb'\1__import__("tests.faults.failpoints", fromlist=["reach"]).reach("\2")'
KILL = "SIGKILL"
FREEZE = "SIGSTOP"


class Failpoint:
    """One of them, as a test sees it: armed for the first process that comes there, whichever that is."""

    def __init__(self, directory: Path, name: str) -> None:
        self._armed = directory / name
        self._reached = directory / f"{name}.reached"

    def arm(self, action: str) -> None:
        """`KILL` or `FREEZE` the process that reaches it next."""
        self._reached.unlink(missing_ok=True)
        ready = self._armed.with_suffix(".new")
        ready.write_text(action)
        ready.rename(self._armed)

    def disarm(self) -> None:
        self._armed.unlink(missing_ok=True)

    @property
    def victim(self) -> int | None:
        """Process id of the one that reached it since it was armed."""
        try:
            return int(self._reached.read_text() or 0) or None
        except FileNotFoundError:
            return None


def names() -> list[str]:
    """Every failpoint in the service."""
    sources = [path.read_bytes() for package in ("app", "worker") for path in (ROOT / package).rglob("*.py")]
    return sorted(mark[2].decode() for source in sources for mark in _MARK.finditer(source))


def reach(name: str) -> None:
    """Called at the failpoint: does what it is armed with, once."""
    armed = Path(os.environ["FAILPOINTS"]) / name
    mine = armed.with_suffix(f".{os.getpid()}")
    with suppress(FileNotFoundError):
        armed.rename(mine)  # by only one of all processes and threads
        action = signal.Signals[mine.read_text()]
        armed.with_suffix(".reached").write_text(str(os.getpid()))
        os.kill(os.getpid(), action)


class _Loader(SourceFileLoader):
    """Turns the comments into calls; lines keep their numbers."""

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        return compile(_MARK.sub(_CALL, source), self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in ("app", "worker"):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None and _MARK.search(Path(spec.origin).read_bytes()):
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def _main(role: str) -> None:
    """`worker` or `api`, or one round of the worker's `sealer`, with failpoints."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "app"]:
        del sys.modules[name]  # what this module has imported itself was loaded without them
    sys.meta_path.insert(0, _Finder())
    if role == "worker":
        runpy.run_module("worker", run_name="__main__")
    elif role == "sealer":
        runpy.run_module("tests.faults.seal", run_name="__main__")
    else:
        sys.argv = ["app", "api"]
        runpy.run_module("app", run_name="__main__")


if __name__ == "__main__":
    _main(sys.argv[1])
