"""The one layer that retries."""

import asyncio
from collections.abc import Sequence
from random import Random

import pytest

from app.domain.errors import ModelError, ModelRefused, ModelUnavailable
from app.domain.step import Usage
from worker.llm.base import ModelReply, ModelRequest
from worker.llm.retry import Answer, RetryPolicy, complete

QUICK = RetryPolicy(tries=3, first_wait_s=0.001)
REPLY = ModelReply(content="hello", tool_calls=(), finish_reason="stop", usage=Usage())


class Script:
    """A provider that fails as it is told, then answers."""

    def __init__(self, *failures: ModelError) -> None:
        self.failures = list(failures)
        self.asked: list[ModelRequest] = []

    async def complete(self, request: ModelRequest) -> ModelReply:
        self.asked.append(request)
        if self.failures:
            raise self.failures.pop(0)
        return REPLY


def ask(script: Script, models: Sequence[str] = ("first", "second"), time_left: float = 60) -> Answer:
    request = ModelRequest(model="", messages=(), tools=(), output=None, max_output_tokens=1, timeout_s=10)
    return asyncio.run(complete(script, request, models, time_left=lambda: time_left, policy=QUICK, random=Random(1)))


def test_a_transient_fault_is_retried_on_the_same_model() -> None:
    script = Script(ModelUnavailable("429"), ModelUnavailable("500"))
    answer = ask(script)
    assert (answer.model, answer.retries) == ("first", 2)
    assert [request.model for request in script.asked] == ["first"] * 3


def test_the_next_model_is_asked_when_the_first_stays_away() -> None:
    answer = ask(Script(*[ModelUnavailable("503")] * 3))
    assert (answer.model, answer.retries) == ("second", 3)


def test_all_models_away_is_an_error() -> None:
    script = Script(*[ModelUnavailable("503")] * 6)
    with pytest.raises(ModelUnavailable, match="503"):
        ask(script)
    assert len(script.asked) == 6


def test_a_refusal_is_final() -> None:
    script = Script(ModelRefused("400"))
    with pytest.raises(ModelRefused):
        ask(script)
    assert len(script.asked) == 1


def test_a_retry_after_that_is_too_long_means_the_next_model() -> None:
    script = Script(ModelUnavailable("429", retry_after=3600))
    assert ask(script).model == "second"


def test_nobody_waits_beyond_the_deadline() -> None:
    script = Script(ModelUnavailable("429", retry_after=5), ModelUnavailable("429", retry_after=5))
    with pytest.raises(ModelUnavailable):
        ask(script, time_left=2)
    assert len(script.asked) == 2


def test_a_call_gets_no_more_time_than_the_run_has() -> None:
    script = Script()
    ask(script, time_left=2)
    assert script.asked[0].timeout_s == 3  # one second more, so that the deadline is what ends it


def test_retry_after_is_kept_and_backoff_grows_with_jitter() -> None:
    policy = RetryPolicy(tries=5, first_wait_s=1, longest_wait_s=3)
    waits = [[policy.wait(failures, None, Random(seed)) for seed in range(200)] for failures in (1, 2, 3, 4)]
    bounds = [max(wait for wait in row if wait is not None) for row in waits]
    assert 0.9 < bounds[0] <= 1 < bounds[1] <= 2 < bounds[2] <= 3
    assert bounds[3] <= 3
    assert policy.wait(5, None, Random(1)) is None
    assert 2 <= (policy.wait(1, 2.0, Random(1)) or 0) <= 3
