"""Agents that need people: they ask, wait for approval, or want somebody to say whether they may go on."""

from decimal import Decimal

from app.domain.agent import Agent, OnExpiry, OnLimit
from app.domain.people import ask_human
from app.domain.tool import Effect, ToolContext, tool
from tests.agents import Verdict, add, charge, charge_and_crash, charge_slowly, crash, echo, open_the_door, pay, rest


@tool(effect=Effect.ONCE, approval=lambda arguments: arguments.amount > 50)
async def refund(ctx: ToolContext, order: str, amount: Decimal) -> str:
    """Give money back; above 50 a person has to agree."""
    return f"refunded {amount} for {order} as {ctx.idempotency_key}"


@tool(effect=Effect.ONCE, approval=lambda arguments: arguments.amount > 50)
async def refund_and_crash(amount: Decimal) -> str:
    """Give money back and fail before it is known whether it worked; above 50 a person has to agree."""
    raise RuntimeError("the line went dead")


@tool(approval=True)
async def announce(text: str) -> str:
    """Tell everybody; a person has to agree."""
    return f"told everybody: {text}"


@tool(approval=True, max_result_chars=10)
async def announce_at_length(text: str) -> str:
    """Tell everybody, and return more than the model is shown."""
    return text * 100


clerk = Agent(
    name="clerk",
    instructions="Refund, announce, and ask when in doubt.",
    tools=(ask_human, refund, refund_and_crash, announce, announce_at_length, pay, open_the_door, echo, rest, charge),
)
"""Its people approve, edit, reject and answer; its reviews do not expire within a test."""

pair = Agent(
    name="pair", instructions="Two people look at it.", tools=(ask_human, refund, announce, pay), four_eyes=True
)

escalating = Agent(
    name="escalating",
    instructions="Go on until somebody says stop.",
    tools=(echo, add, rest, crash, charge, charge_slowly, charge_and_crash, open_the_door, ask_human),
    on_limit=OnLimit.ESCALATE,
)

escalating_typed = Agent(
    name="escalating-typed", instructions="Judge.", tools=(echo,), output=Verdict, on_limit=OnLimit.ESCALATE
)

unanswered = Agent(
    name="unanswered",
    instructions="Nobody is there.",
    tools=(open_the_door, ask_human, charge_and_crash, echo),
    on_limit=OnLimit.ESCALATE,
    review_expires_s=0.5,
    on_review_expiry=OnExpiry.REJECT,
)
"""Its reviews expire at once, and count as rejected."""
