"""What the support agent can do. The model reads the docstrings; notes for the reader of the code are comments."""

import hashlib
import json
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from app.agents.support.search import find_articles
from app.domain.errors import ToolError
from app.domain.tool import Effect, ToolContext, tool

Order = dict[str, Any]

APPROVAL_ABOVE = Decimal(25)
"""A refund of more than this, in the order's currency, needs a person's approval."""


@tool
async def search_articles(query: Annotated[str, Field(max_length=500)], ctx: ToolContext) -> list[dict[str, str]]:
    """Search the shop's help articles. Returns those that fit best, with the id to cite.

    Args:
        query: What the customer wants to know, in a few words.
    """
    articles = await find_articles(ctx.db, query, limit=3)
    return [{"id": article.id, "title": article.title, "text": article.body} for article in articles]


@tool
def lookup_order(order_id: str) -> Order:
    """Look up an order: its status, items, what was paid and what has been refunded.

    Args:
        order_id: The order number, such as A-1001.
    """
    return _order(order_id)


# The predicate sees one call. What several small refunds of an order may come to is for your order system to say.
@tool(effect=Effect.ONCE, approval=lambda arguments: arguments.amount > APPROVAL_ABOVE)
def refund(
    order_id: str, amount: Annotated[Decimal, Field(gt=0, decimal_places=2)], reason: str, ctx: ToolContext
) -> dict[str, str]:
    """Refund all or part of an order to the payment method that was used. This moves money and cannot be undone.

    Args:
        order_id: The order number, such as A-1001.
        amount: How much, in the order's currency; at most its total less what has been refunded already.
        reason: Why, in one sentence, for the accounts.
    """
    order = _order(order_id)
    left = Decimal(order["total"]) - Decimal(order["refunded"])
    if amount > left:
        raise ToolError(
            f"Not refunded: at most {left} {order['currency']} of order {order['order_id']} can be refunded."
        )
    # Here your payment provider is called, with `ctx.idempotency_key` as its idempotency key.
    # Raise ToolError only where it is certain that no money moved: after anything else a person is asked.
    reference = "RF-" + hashlib.sha256(ctx.idempotency_key.encode()).hexdigest()[:10].upper()
    return {
        "reference": reference,
        "order_id": order["order_id"],
        "amount": f"{amount:.2f}",
        "currency": order["currency"],
    }


@cache
def _orders() -> dict[str, Order]:
    # Stands for your order system. There, look up only orders of the customer who asks.
    orders: dict[str, Order] = json.loads(Path(__file__).with_name("orders.json").read_text(encoding="utf-8"))
    return orders


def _order(order_id: str) -> Order:
    order_id = order_id.strip().lstrip("#").upper()
    order = _orders().get(order_id)
    if order is None:
        raise ToolError(f"There is no order {order_id}.")
    return {"order_id": order_id, **order}
