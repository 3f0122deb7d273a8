"""Work beside the work."""

import asyncio
import time

import pytest

from app.background import in_background, within


def test_a_task_that_swallows_a_cancellation_is_asked_again() -> None:
    async def deaf() -> None:
        for _ in range(2):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue
        await asyncio.sleep(60)

    async def scenario() -> None:
        async with in_background(deaf()) as task:
            await asyncio.sleep(0)
        assert task.cancelled()

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_what_takes_long_to_clean_up_is_not_waited_for() -> None:
    async def slow_to_leave() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(1)

    async def scenario() -> float:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await within(0.1, slow_to_leave())
        return time.monotonic() - began

    assert asyncio.run(scenario()) < 0.5


def test_a_result_and_an_error_come_through() -> None:
    async def answer() -> int:
        return 42

    async def fail() -> None:
        raise LookupError("gone")

    assert asyncio.run(within(1, answer())) == 42
    with pytest.raises(LookupError, match="gone"):
        asyncio.run(within(1, fail()))
