"""The stand-in's brain in conversation with the real tools of the support agent (all but the search's ranking)."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from app.agents.support import Answer, agent
from app.agents.support.search import load_articles
from app.devstack import brain
from app.devstack.wire import ChatRequest
from app.domain.data import as_data
from app.domain.errors import ToolError
from app.domain.tool import ToolContext

NOTHING: Any = None
CONTEXT = ToolContext(
    run_id=UUID(int=1),
    tenant="shop",
    attempt=1,
    deadline=datetime(2100, 1, 1, tzinfo=UTC),
    idempotency_key="run:2",
    db=NOTHING,
    http=NOTHING,
)


class Talk:
    """A conversation: `say` gives the answer, `calls` are the tool calls made on the way, one list a turn.

    `reviewer` makes of a refund's result what the model is told in its place.
    """

    def __init__(self, *, finds: list[str], reviewer: Callable[[str], str] | None = None) -> None:
        self.calls: list[list[tuple[str, dict[str, Any]]]] = []
        self._reviewer = reviewer or (lambda result: result)
        self._messages: list[dict[str, Any]] = [{"role": "system", "content": agent.render_instructions("")}]
        found = [load_articles()[article] for article in finds]
        hits = [{"id": article.id, "title": article.title, "text": article.body} for article in found]
        self._tools: dict[str, Callable[[dict[str, Any]], object]] = {
            "search_articles": lambda _: hits,
            "lookup_order": lambda arguments: agent.tools_by_name["lookup_order"].function(**arguments),
            "refund": self._refund,
        }

    def say(self, text: str) -> Answer:
        self._messages.append({"role": "user", "content": text})
        while (reply := brain.think(self._request())).tool_calls:
            turn = [(call.name, json.loads(call.arguments_text)) for call in reply.tool_calls]
            self.calls.append(turn)
            asked = [
                {"id": f"{len(self.calls)}.{n}", "function": {"name": name, "arguments": json.dumps(arguments)}}
                for n, (name, arguments) in enumerate(turn)
            ]
            self._messages.append({"role": "assistant", "content": None, "tool_calls": asked})
            for call, (name, arguments) in zip(asked, turn, strict=True):
                result = self._call(name, arguments)
                self._messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        assert reply.content is not None
        self._messages.append({"role": "assistant", "content": reply.content})
        return Answer.model_validate_json(reply.content)

    def _request(self) -> ChatRequest:
        schema = {"name": "Answer", "schema": Answer.model_json_schema()}
        tools = [
            {"function": {"name": tool.name, "description": tool.description, "parameters": tool.schema}}
            for tool in agent.tools
        ]
        wanted = {"type": "json_schema", "json_schema": schema}
        return ChatRequest.model_validate(
            {"model": "m", "messages": self._messages, "tools": tools, "response_format": wanted}
        )

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        try:
            result = as_data(name, json.dumps(self._tools[name](arguments)))
            return self._reviewer(result) if name == "refund" else result
        except ToolError as error:
            return as_data(name, str(error))

    @staticmethod
    def _refund(arguments: dict[str, Any]) -> object:
        tool = agent.tools_by_name["refund"]
        validated = tool.arguments.model_validate(arguments)
        return tool.function(**{name: getattr(validated, name) for name in arguments}, ctx=CONTEXT)


def test_a_question_about_a_rule_is_answered_from_an_article_that_is_cited() -> None:
    talk = Talk(finds=["returns-policy"])
    answer = talk.say("How many days do I have for returning an unused pan?")
    assert [[name for name, _ in turn] for turn in talk.calls] == [["search_articles"]]
    assert answer.citations == ["returns-policy"]
    assert "30 days" in answer.answer
    assert "[returns-policy]" in answer.answer
    assert "stand-in model" in answer.answer


def test_a_refund_looks_first_and_then_pays_what_the_order_has_left() -> None:
    talk = Talk(finds=["damaged-or-faulty", "refunds"])
    answer = talk.say("My teapot from order A-1001 arrived broken. I want a refund.")
    assert [[name for name, _ in turn] for turn in talk.calls] == [["lookup_order", "search_articles"], ["refund"]]
    assert talk.calls[1][0][1]["amount"] == 43.9
    assert "I have refunded 43.90 EUR; the reference is RF-" in answer.answer
    assert answer.citations == ["damaged-or-faulty"]


def test_it_asks_for_the_order_number_and_goes_on_when_it_has_it() -> None:
    talk = Talk(finds=["refunds"])
    assert "order number" in talk.say("I want a refund!").answer
    assert talk.calls == []
    assert "46.50 EUR" in talk.say("It's A-1006, thanks").answer
    assert talk.calls[-1][0][0] == "refund"


def test_an_unknown_order_is_said_to_be_unknown() -> None:
    talk = Talk(finds=[])
    answer = talk.say("Refund order A-9999, please")
    assert "There is no order A-9999" in answer.answer
    assert "refund" not in [name for turn in talk.calls for name, _ in turn]


def test_what_the_tool_refuses_is_passed_on() -> None:
    answer = Talk(finds=[]).say("Please refund 100 EUR of order A-1001")
    assert "at most 43.90 EUR" in answer.answer


def test_a_refund_that_a_person_rejected_is_said_to_be_so_and_not_asked_for_again() -> None:
    talk = Talk(finds=[], reviewer=lambda _: "A person rejected this call: the photographs show another pot")
    answer = talk.say("My teapot from order A-1001 arrived broken. I want a refund.")
    assert "My colleagues have not approved the refund: the photographs show another pot" in answer.answer
    assert [name for turn in talk.calls for name, _ in turn].count("refund") == 1


def test_a_refund_whose_amount_a_person_changed_is_told_as_it_was_made() -> None:
    changed = '{"reference":"RF-1","order_id":"A-1001","amount":"20.00","currency":"EUR"}'
    talk = Talk(finds=[], reviewer=lambda _: "A person changed the arguments.\n" + as_data("refund", changed))
    answer = talk.say("My teapot from order A-1001 arrived broken. I want a refund.")
    assert "I have refunded 20.00 EUR; the reference is RF-1." in answer.answer


def test_no_refund_after_30_days_or_before_delivery_or_twice() -> None:
    for order, why in (("A-1004", "within 30 days"), ("A-1003", "not been delivered"), ("A-1005", "already")):
        talk = Talk(finds=[])
        assert why in talk.say(f"I want a refund for {order}").answer
        assert "refund" not in [name for turn in talk.calls for name, _ in turn]


def test_where_an_order_is() -> None:
    talk = Talk(finds=[])
    assert "JD014600003828" in talk.say("Where is my order A-1002?").answer
    assert talk.calls == [[("lookup_order", {"order_id": "A-1002"})]]


def test_the_next_question_stands_for_itself() -> None:
    talk = Talk(finds=["delivery"])
    talk.say("Where is my order A-1002?")
    answer = talk.say("And do you ship to Norway?")
    assert "Norway" in answer.answer
    assert "A-1002" not in answer.answer
    assert answer.citations == ["delivery"]


def test_where_nothing_is_found_it_says_so() -> None:
    answer = Talk(finds=[]).say("Do you insure zebras?")
    assert "found nothing" in answer.answer
    assert answer.citations == []
