"""A block that may go on only while the lease is certainly held."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import pytest
import uvloop

from app.domain.errors import LeaseLost
from worker.lease import WhileSure


def until(moment: float) -> Callable[[], float]:
    return lambda: max(0.0, moment - time.monotonic())


def test_a_block_is_not_begun_without_a_lease() -> None:
    async def run() -> None:
        with WhileSure(lambda: 0.0):
            pytest.fail("begun")

    with pytest.raises(LeaseLost, match="not begun"):
        asyncio.run(run())


def test_a_block_is_cut_off_when_the_lease_is_over() -> None:
    async def run() -> None:
        with WhileSure(until(time.monotonic() + 0.1)):
            await asyncio.sleep(5)

    began = time.monotonic()
    with pytest.raises(LeaseLost, match="cut off"):
        asyncio.run(run())
    assert time.monotonic() - began < 1


def test_a_block_goes_on_while_the_lease_is_extended() -> None:
    async def run() -> str:
        began = time.monotonic()
        with WhileSure(lambda: 0.05 if time.monotonic() - began < 1 else 0.0):
            await asyncio.sleep(0.3)
        await asyncio.sleep(1)  # nothing is left behind that would cut this off
        return "done"

    assert asyncio.run(run()) == "done"


def test_who_is_cancelled_from_outside_stays_cancelled() -> None:
    async def run() -> None:
        with WhileSure(until(time.monotonic() + 60)):
            await asyncio.sleep(5)

    async def cancel() -> bool:
        task = asyncio.create_task(run())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancel())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_what_a_task_would_have_done_next_is_not_done_after_a_freeze(run: Callable[..., None]) -> None:
    """What it waited for is there when it wakes up, and so is the end of the lease."""
    went_on = []

    async def wait_for_a_connection() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            loop = asyncio.get_running_loop()
            loop.call_later(0.05, time.sleep, 0.3)  # the freeze
            threading.Timer(0.15, theirs.send, [b"connected"]).start()
            with WhileSure(until(time.monotonic() + 0.25)):
                await loop.sock_recv(ours, 100)
                went_on.append("sent")

    with pytest.raises(LeaseLost):
        run(wait_for_a_connection())
    assert went_on == []
