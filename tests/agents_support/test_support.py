"""The sample agent: its articles, its answer and its order tools. The search itself needs Postgres."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from pydantic import ValidationError

from app.agents.support import Answer, agent
from app.agents.support.search import load_articles
from app.agents.support.tools import APPROVAL_ABOVE
from app.domain.errors import ToolError
from app.domain.tool import Effect, ToolContext
from app.registry import load_agents

NOTHING: Any = None


def context(idempotency_key: str) -> ToolContext:
    return ToolContext(
        run_id=UUID(int=1),
        tenant="shop",
        attempt=1,
        deadline=datetime(2100, 1, 1, tzinfo=UTC),
        idempotency_key=idempotency_key,
        db=NOTHING,
        http=NOTHING,
    )


def refund(order_id: str, amount: object, *, key: str = "run:2") -> dict[str, str]:
    tool = agent.tools_by_name["refund"]
    arguments: Any = tool.arguments.model_validate({"order_id": order_id, "amount": amount, "reason": "broken"})
    result: dict[str, str] = tool.function(order_id, arguments.amount, arguments.reason, context(key))
    return result


def test_the_agent_is_found_by_its_name() -> None:
    assert load_agents(["app.agents"])["support"] is agent


def test_every_article_has_a_title_and_a_text() -> None:
    articles = load_articles()
    assert len(articles) >= 8
    for article in articles.values():
        assert article.title
        assert not article.title.startswith("#")
        assert len(article.body) > 200


def test_an_answer_may_cite_only_articles_that_exist() -> None:
    assert Answer(answer="Yes.", citations=["refunds"]).citations == ["refunds"]
    with pytest.raises(ValidationError, match="no such article: made-up"):
        Answer(answer="Yes.", citations=["refunds", "made-up"])


def test_an_order_is_found_however_its_number_is_written() -> None:
    lookup = agent.tools_by_name["lookup_order"].function
    assert lookup(" #a-1001 ") == lookup("A-1001")
    with pytest.raises(ToolError, match="There is no order A-9"):
        lookup("A-9")


def test_a_refund_is_once_and_its_reference_is_the_same_for_the_same_call() -> None:
    assert agent.tools_by_name["refund"].effect is Effect.ONCE
    first, again, other = (refund("A-1001", 10, key=key) for key in ("run:2", "run:2", "run:4"))
    assert first == again
    assert first["amount"] == "10.00"
    assert first["reference"] != other["reference"]


def test_a_small_refund_is_free_and_a_large_one_needs_approval() -> None:
    tool = agent.tools_by_name["refund"]
    for amount, needed in ((0.01, False), (25, False), ("25.00", False), ("25.01", True), (1_000, True)):
        arguments = tool.arguments.model_validate({"order_id": "A-1001", "amount": amount, "reason": "broken"})
        assert tool.needs_approval(arguments) is needed, amount


def test_looking_never_needs_approval() -> None:
    assert [tool.name for tool in agent.tools if tool.approval is not False] == ["refund"]


def test_the_instructions_name_the_amount() -> None:
    assert f"A refund of more than {APPROVAL_ABOVE} waits" in agent.render_instructions("hello")


@pytest.mark.parametrize("amount", [43.91, "43.91", 1_000])
def test_no_more_is_refunded_than_the_order_has_left(amount: object) -> None:
    with pytest.raises(ToolError, match=r"at most 43\.90 EUR"):
        refund("A-1001", amount)


@pytest.mark.parametrize("amount", [0, -1, "0.001", "NaN", "a lot"])
def test_an_amount_that_is_none_does_not_reach_the_tool(amount: object) -> None:
    with pytest.raises(ValidationError):
        refund("A-1001", amount)
