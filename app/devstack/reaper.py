"""Kills what a supervisor leaves behind when it dies without stopping it first. A small process of its own.

It is told on standard input which processes there are: `+PID SIGNAL` when one starts, `-PID` when it has ended. At the
end of the input the supervisor is gone: each process that is left gets its signal, and soon after its group is killed.

The standard library only, and little of it: it starts with every stack and has to be there before the first process.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable

GRACE_SECONDS = 5.0


def listen(lines: Iterable[str]) -> dict[int, int]:
    """Follow the supervisor to its end. Returns the processes it left, and the signal that asks each to stop."""
    left: dict[int, int] = {}
    for line in lines:
        pid, *number = line[1:].split()
        if line.startswith("+"):
            left[int(pid)] = int(number[0])
        else:
            left.pop(int(pid), None)
    return left


def reap(left: dict[int, int]) -> None:
    """Ask each process to stop; after `GRACE_SECONDS` kill the groups of those that are still there."""
    for pid, number in left.items():
        send(pid, number)
        send(pid, signal.SIGCONT)  # one that was stopped would not hear it
    until = time.monotonic() + GRACE_SECONDS
    while any(send(pid, 0) for pid in left) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        send(pid, signal.SIGKILL)


def send(pid: int, number: int) -> bool:
    """Signal the process group that `pid` leads. False: nobody is left in it."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of which only a zombie is left
        return False
    return True


if __name__ == "__main__":
    # A terminal sends these to everybody; this process is the one that has to outlive the supervisor.
    for deaf_to in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(deaf_to, signal.SIG_IGN)
    reap(listen(sys.stdin))
