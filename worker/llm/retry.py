"""The one layer that retries: the same model with backoff, then the next of the agent's fallback models."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from app.domain.errors import ModelUnavailable
from worker.llm.base import Model, ModelReply, ModelRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often one model is asked, and how long to wait in between (seconds).

    Backoff is exponential with full jitter. A `Retry-After` above `longest_wait_s` counts as "ask somebody else".
    """

    tries: int = 4
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0

    def wait(self, failures: int, retry_after: float | None, random: Random) -> float | None:
        """Seconds until the next try after so many failures; None: no more tries."""
        if failures >= self.tries or (retry_after is not None and retry_after > self.longest_wait_s):
            return None
        backoff = random.uniform(0, min(self.longest_wait_s, self.first_wait_s * 2.0 ** (failures - 1)))
        return backoff if retry_after is None else retry_after + backoff


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply, the model that gave it, how many calls failed before, and how long all of it took (milliseconds)."""

    reply: ModelReply
    model: str
    retries: int
    duration_ms: int


async def complete(
    provider: Model,
    request: ModelRequest,
    models: Sequence[str],
    *,
    time_left: Callable[[], float],
    policy: RetryPolicy,
    random: Random,
) -> Answer:
    """Ask the models in order until one answers. `time_left`: seconds until the run's deadline.

    Raises `ModelUnavailable` when all have failed or no time is left, `ModelRefused` at once.
    """
    began = time.monotonic()
    failed = 0
    last_error = ModelUnavailable("no model was asked")
    for model in models:
        for failures in range(1, policy.tries + 1):
            # A second more than is left: it is the run's deadline that ends the call then, and is the stop reason.
            attempt = replace(request, model=model, timeout_s=min(request.timeout_s, time_left() + 1))
            try:
                reply = await provider.complete(attempt)
                return Answer(reply, model, failed, round((time.monotonic() - began) * 1000))
            except ModelUnavailable as error:
                failed += 1
                last_error = error
            logger.warning("model unavailable", extra={"fields": {"model": model, "error": str(last_error)}})
            wait = policy.wait(failures, last_error.retry_after, random)
            if wait is None or wait >= time_left():
                break
            await asyncio.sleep(wait)
    raise last_error
