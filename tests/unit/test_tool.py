"""`@tool` makes a tool of a function."""

from decimal import Decimal
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from app.domain.tool import Effect, ToolContext, tool


class Address(BaseModel):
    street: str
    city: str


@tool(effect=Effect.ONCE, approval=lambda arguments: arguments.amount > 50, timeout_s=3)
async def refund(
    ctx: ToolContext,
    order_id: Annotated[str, Field(pattern=r"^A-\d+$")],
    amount: Decimal,
    how: Literal["card", "voucher"] = "card",
    to: Address | None = None,
) -> str:
    """Refund an order.

    Only whole orders.

    Args:
        order_id: Number of the order,
            as on the invoice.
        amount (Decimal): Euros.
        how: Where the money goes.
    """
    return f"{order_id} {amount} {how} {to} {ctx.tenant}"


def test_the_schema_comes_from_signature_types_and_docstring() -> None:
    schema = refund.schema
    assert refund.name == "refund"
    assert refund.description == "Refund an order.\n\nOnly whole orders."
    assert set(schema["properties"]) == {"order_id", "amount", "how", "to"}
    assert schema["required"] == ["order_id", "amount"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["order_id"] == {
        "description": "Number of the order, as on the invoice.",
        "pattern": r"^A-\d+$",
        "title": "Order Id",
        "type": "string",
    }
    assert schema["properties"]["amount"]["description"] == "Euros."
    assert schema["properties"]["how"]["enum"] == ["card", "voucher"]
    assert schema["$defs"]["Address"]["required"] == ["street", "city"]


def test_the_context_is_not_an_argument_of_the_model() -> None:
    assert refund.context_parameter == "ctx"
    with pytest.raises(ValidationError):
        refund.arguments.model_validate({"order_id": "A-1", "amount": 1, "ctx": {}})


def test_what_is_declared_is_kept() -> None:
    assert refund.effect is Effect.ONCE
    assert refund.timeout_s == 3
    assert refund.is_async
    assert refund.needs_approval(refund.arguments.model_validate({"order_id": "A-1", "amount": 51}))
    assert not refund.needs_approval(refund.arguments.model_validate({"order_id": "A-1", "amount": 50}))


def test_a_plain_function_without_arguments_is_a_tool() -> None:
    @tool
    def now() -> str:
        """The time."""
        return "noon"

    assert not now.is_async
    assert now.effect is Effect.READ
    assert now.schema == {"type": "object", "properties": {}, "additionalProperties": False}


def test_a_parameter_without_a_type_is_refused() -> None:
    with pytest.raises(TypeError, match="parameter order has no type"):

        @tool
        def look_up(order) -> str:  # type: ignore[no-untyped-def]
            return str(order)


def test_a_variable_number_of_arguments_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a named one"):

        @tool
        def look_up(*orders: str) -> str:
            return str(orders)


def test_a_name_the_protocol_does_not_allow_is_refused() -> None:
    with pytest.raises(TypeError, match="tool name 'look up'"):

        @tool(name="look up")
        def look_up() -> str:
            return ""
