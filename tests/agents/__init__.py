"""Agents that the tests, the benchmarks and the fault suite run. Each exists for what its name says."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from dataclasses import replace
from decimal import Decimal

from pydantic import BaseModel, Field, JsonValue

from app.domain.agent import Agent, Limits
from app.domain.errors import ToolError
from app.domain.tool import Effect, ToolContext, tool


@tool
async def echo(text: str) -> str:
    """Give the text back.

    Args:
        text: What to give back.
    """
    return text


@tool
def add(left: int, right: int = 1) -> dict[str, int]:
    """Add two numbers; a plain function, so it runs in a thread."""
    time.sleep(0.01)
    return {"sum": left + right}


@tool
async def refuse(why: str) -> str:
    """Say that it did not work."""
    raise ToolError(why)


@tool
async def crash() -> str:
    """Fail in a way nobody planned."""
    raise RuntimeError("a secret of the tool")


@tool(timeout_s=0.2)
async def dawdle(seconds: float) -> str:
    """Take longer than it may."""
    await asyncio.sleep(seconds)
    return "done"


@tool
async def rest(seconds: float) -> str:
    """Take a while."""
    await asyncio.sleep(seconds)
    return "rested"


@tool(effect=Effect.ONCE)
async def charge(ctx: ToolContext, amount: Decimal) -> str:
    """Charge the customer."""
    return f"charged {amount} as {ctx.idempotency_key}"


@tool(effect=Effect.ONCE)
async def charge_slowly(amount: Decimal) -> str:
    """Charge the customer, in a while."""
    await asyncio.sleep(20)
    return f"charged {amount}"


@tool(effect=Effect.ONCE)
async def charge_and_crash(amount: Decimal) -> str:
    """Charge the customer and fail before it is known whether it worked."""
    raise RuntimeError("the line went dead")


@tool(effect=Effect.IDEMPOTENT)
async def tag(ctx: ToolContext, name: str) -> str:
    """Tag something."""
    return f"{name} {ctx.idempotency_key}"


@tool(approval=True)
async def open_the_door() -> str:
    """Open the door; a person has to agree."""
    return "open"


@tool(approval=lambda arguments: arguments.amount > 50)
async def pay(amount: int) -> str:
    """Pay; above 50 a person has to agree."""
    return f"paid {amount}"


@tool
async def who_am_i(ctx: ToolContext) -> dict[str, JsonValue]:
    """What a tool knows about its run."""
    return {"tenant": ctx.tenant, "attempt": ctx.attempt, "run_id": str(ctx.run_id)}


@tool
async def odd_text() -> str:
    """Give back what Postgres does not store."""
    return "nul \0 and surrogate \ud800"


@tool
def kill_the_worker() -> str:
    """Kill the process that runs this, without warning."""
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


@tool
def leave() -> str:
    """End the program, as a command-line parser does."""
    sys.exit(2)


@tool
async def cancel_itself() -> str:
    """Raise what only the event loop should."""
    raise asyncio.CancelledError


@tool
async def bytes_and_worse() -> dict[str, object]:
    """Give back what JSON has no form for."""
    return {"bytes": b"\xff", "surrogate": "\ud800", "nan": float("nan")}


@tool(timeout_s=120)
async def hold_the_loop(ctx: ToolContext, seconds: float) -> str:
    """Hold up everything in this process, in the run's first attempt."""
    if ctx.attempt == 1:
        time.sleep(seconds)
    return "let go"


@tool(timeout_s=120)
async def cling(ctx: ToolContext, seconds: float) -> str:
    """Do not heed a cancellation, in the run's first attempt."""
    until = time.monotonic() + (seconds if ctx.attempt == 1 else 0)
    while time.monotonic() < until:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(until - time.monotonic())
    return "let go"


@tool
async def ask_postgres(ctx: ToolContext, seconds: float) -> str:
    """Make a slow query."""
    await ctx.db.fetch_all("SELECT pg_sleep(:seconds)", {"seconds": seconds})
    return "asked"


toolbox = Agent(
    name="toolbox",
    instructions="You have every tool.",
    tools=(
        echo,
        add,
        refuse,
        crash,
        dawdle,
        rest,
        charge,
        charge_slowly,
        charge_and_crash,
        tag,
        open_the_door,
        pay,
        who_am_i,
        odd_text,
        leave,
        cancel_itself,
        bytes_and_worse,
        kill_the_worker,
        hold_the_loop,
        cling,
        ask_postgres,
    ),
)

impatient = Agent(name="impatient", instructions="Ask.", tools=(open_the_door,), review_expires_s=0.5)

hasty = Agent(name="hasty", instructions="Answer.", model_timeout_s=0.5)

doorkeeper = Agent(name="doorkeeper", instructions="Ask.", tools=(replace(echo, approval=True),))

bench = Agent(name="bench", instructions="Repeat after me.", tools=(echo,))

with_fallback = Agent(name="with-fallback", instructions="Answer.", model="gpt-5", fallback_models=("gpt-5-nano",))

unpriced = Agent(name="unpriced", instructions="Answer.", model="home-made-1")

free = Agent(name="free", instructions="Answer.", model="home-made-1", limits=Limits(max_cost_usd=None))


class Question(BaseModel, extra="forbid"):
    """What the agent `typed` takes."""

    subject: str = Field(min_length=1)
    urgent: bool = False


class Verdict(BaseModel):
    """What the agent `typed` answers."""

    verdict: str
    score: int = Field(ge=0, le=10)


typed = Agent(name="typed", instructions="Judge.", input=Question, output=Verdict)


def _broken_instructions(_: JsonValue) -> str:
    raise RuntimeError("a bug in an agent")


broken = Agent(name="broken", instructions=_broken_instructions)
