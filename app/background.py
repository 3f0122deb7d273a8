"""Work beside the work: tasks for the length of a block, and answers that are not waited for too long."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@asynccontextmanager
async def in_background(work: Coroutine[Any, Any, T]) -> AsyncIterator["asyncio.Task[T]"]:
    """Do something for the length of the block, and end it with the block."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        # redis-py swallows a cancellation that reaches it while it connects, so it is asked until it has heard.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=0.2)


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result, or `TimeoutError` after so many seconds.

    Unlike `asyncio.timeout` this does not wait until the work has cleaned up: psycopg takes ten seconds to take back a
    statement from a server that does not answer.
    """
    task = asyncio.create_task(work)
    done, _ = await asyncio.wait([task], timeout=seconds)
    if not done:
        task.cancel()
        task.add_done_callback(_forget)
        raise TimeoutError
    return task.result()


def _forget(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()
