"""The fault suite's agents: one tool of each effect, each of which writes into the suite's external ledger."""

import json
import os
from dataclasses import replace
from urllib.request import Request, urlopen

import aiohttp

from app.domain.agent import Agent
from app.domain.tool import Effect, ToolContext, tool


@tool
def look_up(ctx: ToolContext, text: str) -> str:
    """Look something up; may be repeated. A plain function, so it runs in a thread."""
    body = json.dumps(_entry(ctx, text)).encode()
    with urlopen(Request(f"{_ledger()}/look", body, {"Content-Type": "application/json"}), timeout=10) as answer:
        return str(answer.read().decode())


@tool(effect=Effect.IDEMPOTENT)
async def put(ctx: ToolContext, text: str) -> str:
    """Put something into the ledger; with the same key it stays one entry."""
    return await _post("put", _entry(ctx, text))


@tool(effect=Effect.ONCE)
async def charge(ctx: ToolContext, text: str) -> str:
    """Charge somebody; a second time would be a second charge."""
    return await _post("charge", _entry(ctx, text))


def _entry(ctx: ToolContext, text: str) -> dict[str, str]:
    return {"run": str(ctx.run_id), "call": text, "key": ctx.idempotency_key}


async def _post(kind: str, entry: dict[str, str]) -> str:
    async with aiohttp.ClientSession() as session, session.post(f"{_ledger()}/{kind}", json=entry) as answer:
        return await answer.text()


def _ledger() -> str:
    return os.environ["LEDGER_URL"]


bookkeeper = Agent(
    name="bookkeeper",
    instructions="Keep the books.",
    tools=(look_up, put, charge),
    model_timeout_s=2,
)

cashier = Agent(
    name="cashier",
    instructions="Charge first.",
    tools=(charge, put, look_up),
    model_timeout_s=2,
)
"""The same, but its runs begin with what must not happen twice."""

teller = Agent(
    name="teller",
    instructions="Charge, when somebody agrees.",
    tools=(replace(charge, approval=True), put),
    model_timeout_s=2,
    four_eyes=True,
)
"""Its charges need a person who is not the one that submitted the run."""
