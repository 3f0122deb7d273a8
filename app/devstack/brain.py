"""The stand-in model's brain: plays the support agent by rules on free text, from nothing but the request it is sent.

It remembers nothing. What it has asked for and been told is read from the transcript, so that it never asks twice and
a resumed run goes on where it was. To agents whose tools it does not know it gives a plain answer.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

from app.devstack.structured import in_format
from app.devstack.wire import Call, ChatRequest, Reply

SIGNATURE = "(I am the stand-in model: simple rules, not a real model.)"
_RETURN_DAYS = 30
_READS = 4_000
"""Characters of a message that are looked at: the patterns below take quadratic time in the worst case."""

_ORDER_NUMBER = re.compile(
    r"\b([a-z]{1,3}-?\d{3,8})\b|(?:order|number|no\.?)\s*#?\s*(\d{3,8})\b|#(\d{3,8})\b", re.IGNORECASE
)
_AMOUNT = re.compile(r"(?:€|\beur\b)\s*(\d+(?:[.,]\d\d)?)|\b(\d+(?:[.,]\d\d)?)\s*(?:€|eur\b|euros?\b)", re.IGNORECASE)
_REFUND = re.compile(r"\b(refund(ed)?|reimburse|money back)\b", re.IGNORECASE)
_RULE = re.compile(
    r"\b(polic(y|ies)|how (long|much|do|does|are)|when (do|does|will|is)|rules?|conditions?)\b", re.IGNORECASE
)
_THIS_ORDER = re.compile(
    r"\bwhere('s| is| are)\b.*\b(my|order|parcel)\b|\b(track|status of)\b.*\bmy (order|parcel|package)\b"
    r"|\b(not|never|hasn't|didn't) (yet )?arrived?\b|\bwhen will (it|my (order|parcel|package))\b",
    re.IGNORECASE,
)
_FAULT = re.compile(r"\b(broken?|damaged?|fault\w*|defect\w*|wrong|crack\w*|chipped|smashed)\b", re.IGNORECASE)
_REJECTION = re.compile(r"A person rejected this call: (.*)", re.DOTALL)
_DATA = re.compile(r'<data-(?P<code>\w+) from="[^"]*">\n(?P<text>.*)\n</data-(?P=code)>', re.DOTALL)
_COURTESY = re.compile(r"\b(thanks?|thank you|cheers)\b", re.IGNORECASE)
_LITTLE_WORDS = """
    a about also an and any anything are arrive arrived as ask at be been but by can could did didn do does
    doesn don eur euro euros for from get give got had has hasn have haven hello hey hi how i if in is isn it
    its just know like ll long may me much my need no not number of off ok on one or order orders our please re
    say see should so some something take tell thank thanks that the their them then there these they this to
    us ve want was way we what when where which who why will with would yes yet you your
"""
_EMPTY_WORDS = frozenset(_LITTLE_WORDS.split())


def think(request: ChatRequest) -> Reply:
    """The next reply in this conversation."""
    talk = _Conversation(request)
    if not talk.is_support:
        return Reply(content=in_format(request.response_format, _plain_answer(talk), []))
    if calls := talk.next_calls():
        return Reply(tool_calls=calls)
    answer, citations = _support_answer(talk)
    return Reply(content=in_format(request.response_format, f"{answer} {SIGNATURE}", citations))


@dataclass(frozen=True, slots=True)
class _Article:
    id: str
    text: str


class _Conversation:
    """What the transcript holds, and what follows from it."""

    def __init__(self, request: ChatRequest) -> None:
        self._customer = [message.text[:_READS] for message in request.messages if message.role == "user"] or [""]
        self._parameters = {tool.function.name: tool.function.parameters for tool in request.tools}
        if request.tool_choice == "none":
            self._parameters = {}
        told = {message.tool_call_id: _data_in(message.text) for message in request.messages if message.role == "tool"}
        self._results = [
            (call.function.name, _json(call.function.arguments), told.get(call.id, ""))
            for message in request.messages
            for call in message.tool_calls or ()
        ]

    @property
    def is_support(self) -> bool:
        return bool({"search_articles", "lookup_order"} & self._parameters.keys())

    @property
    def tools(self) -> Sequence[str]:
        return list(self._parameters)

    @cached_property
    def _asked_at(self) -> int:
        """Which of the customer's messages asks for something: "it's A-1001" only completes the one before."""
        asking = (n for n, text in enumerate(self._customer) if _key_words(text) or _THIS_ORDER.search(text))
        return max(asking, default=len(self._customer) - 1)

    @property
    def question(self) -> str:
        return self._customer[self._asked_at]

    @cached_property
    def order_number(self) -> str | None:
        """From the question or what followed it; a question that needs an order may mean the one named earlier."""
        texts = self._customer if self._needs_order else self._customer[self._asked_at :]
        for text in reversed(texts):
            if match := _ORDER_NUMBER.search(text):
                return next(group for group in match.groups() if group).upper()
        return None

    @property
    def wants_refund(self) -> bool:
        return bool(_REFUND.search(self.question)) and not _RULE.search(self.question)

    @property
    def _needs_order(self) -> bool:
        return self.wants_refund or bool(_THIS_ORDER.search(self.question))

    @property
    def lacks_order_number(self) -> bool:
        return self._needs_order and self.order_number is None

    def next_calls(self) -> list[Call]:
        """What to ask for now: first everything there is to know, then the refund if there is to be one."""
        if self.lacks_order_number:
            return []
        return self._unanswered(self._inquiries()) or self._unanswered(self._refunds())

    def _unanswered(self, calls: Iterator[Call]) -> list[Call]:
        return [call for call in calls if self._can(call) and self._result(call) is None]

    def _inquiries(self) -> Iterator[Call]:
        if self.order_number:
            yield self._lookup()
        if words := _key_words(self.question):
            yield Call(name="search_articles", arguments={"query": " ".join(words)})

    def _refunds(self) -> Iterator[Call]:
        order = self.order
        if not self.wants_refund or order is None or self.refusal is not None:
            return
        match = _AMOUNT.search(self.question)
        amount = Decimal((match[1] or match[2]).replace(",", ".")) if match else _refundable(order)
        yield Call(
            name="refund",
            arguments={"order_id": order["order_id"], "amount": float(amount), "reason": self.question.strip()[:200]},
        )

    def _lookup(self) -> Call:
        return Call(name="lookup_order", arguments={"order_id": self.order_number})

    @cached_property
    def order(self) -> dict[str, Any] | None:
        """The order as the tool gave it; None where it gave none."""
        found = _json(self.order_text or "")
        return found if isinstance(found, dict) and "order_id" in found else None

    @property
    def order_text(self) -> str | None:
        return self._result(self._lookup()) if self.order_number else None

    @property
    def refusal(self) -> str | None:
        """Why this order is not refunded."""
        order = self.order or {}
        days = order.get("days_since_delivery", 0)
        if _refundable(order) <= 0:
            return "It has been refunded in full already."
        if order.get("status") in ("processing", "shipped"):
            return "It has not been delivered yet, so I cannot refund it now."
        if days > _RETURN_DAYS and not _FAULT.search(self.question):
            return f"I cannot refund it: that is possible within {_RETURN_DAYS} days of delivery."
        return None

    @property
    def refund_text(self) -> str | None:
        """What the refund tool said to the refund that is wanted."""
        return next((self._result(call) for call in self._refunds()), None)

    @cached_property
    def articles(self) -> list[_Article]:
        """The articles that were found for this question, best first."""
        found = [_json(self._result(call) or "") for call in self._inquiries() if call.name == "search_articles"]
        return [
            _Article(str(item["id"]), str(item["text"]))
            for result in found
            if isinstance(result, list)
            for item in result
            if isinstance(item, dict) and {"id", "text"} <= item.keys()
        ]

    def _can(self, call: Call) -> bool:
        """Is there such a tool, with parameters that these arguments fit?"""
        parameters = self._parameters.get(call.name)
        if parameters is None:
            return False
        given = dict(call.arguments) if isinstance(call.arguments, dict) else {}
        properties, required = parameters.get("properties"), parameters.get("required") or []
        return (
            isinstance(properties, dict)
            and isinstance(required, list)
            and set(required) <= given.keys() <= properties.keys()
        )

    def _result(self, call: Call) -> str | None:
        """What this very call was answered with, if it has been made."""
        same = (text for name, arguments, text in self._results if name == call.name and arguments == call.arguments)
        return next(same, None)


def _support_answer(talk: _Conversation) -> tuple[str, list[str]]:
    """What the customer is told, and the ids of the articles that it rests on."""
    if talk.lacks_order_number:
        return "Which order is this about? Please tell me the order number; it looks like A-1001.", []
    said = [*_about_order(talk), *_about_refund(talk)]
    quotes = _quotes(talk.question, talk.articles)
    said += [f"{sentence} [{article}]" for article, sentence in quotes]
    if not said and _key_words(talk.question):
        said = ["I have found nothing about this in our help articles; a colleague will answer by e-mail."]
    elif not said and _COURTESY.search(talk.question):
        said = ["You are welcome!"]
    elif not said:
        said = ["Hello! I can look up orders, explain our rules and issue refunds. What is it about?"]
    return " ".join(said), list(dict.fromkeys(article for article, _ in quotes))


def _about_order(talk: _Conversation) -> Iterator[str]:
    order = talk.order
    if talk.order_text is None:
        return
    if order is None:
        yield f"I have nothing about order {talk.order_number}; our system says: {talk.order_text}"
        yield "Please check the number in the e-mail that confirmed your order."
        return
    items = ", ".join(f"{item['quantity']} x {item['name']}" for item in order.get("items", ()))
    yield f"Order {order['order_id']} ({items}; {order.get('total')} {order.get('currency')}) {_state_of(order)}."


def _state_of(order: dict[str, Any]) -> str:
    match order.get("status"):
        case "delivered" if "days_since_delivery" in order:
            return f"was delivered {order['days_since_delivery']} days ago"
        case "shipped" if "expected_in_days" in order:
            carrier = f"with {order.get('carrier')}, tracking code {order.get('tracking_code')}"
            return f"is on its way {carrier}, and should arrive in {order['expected_in_days']} days"
        case "processing":
            return "is being prepared and has not left our warehouse"
        case status:
            return f"is {status}"


def _about_refund(talk: _Conversation) -> Iterator[str]:
    if not talk.wants_refund or talk.order is None:
        return
    if talk.refusal:
        yield talk.refusal
        return
    if (receipt := _receipt(talk.refund_text or "")) is not None:
        amount = f"{receipt.get('amount')} {receipt.get('currency')}"
        yield f"I have refunded {amount}; the reference is {receipt['reference']}."
    elif (said_no := _REJECTION.match(talk.refund_text or "")) is not None:
        yield f"My colleagues have not approved the refund: {said_no[1]}"
    elif talk.refund_text:
        yield f"About the refund our system says: {talk.refund_text}"
    else:
        yield "I cannot issue refunds myself; a colleague will do it."


def _receipt(text: str) -> dict[str, Any] | None:
    """What the refund tool returned."""
    found = _json(text)
    return found if isinstance(found, dict) and "reference" in found else None


def _refundable(order: dict[str, Any]) -> Decimal:
    return Decimal(str(order.get("total", 0))) - Decimal(str(order.get("refunded", 0)))


def _quotes(question: str, articles: Sequence[_Article]) -> list[tuple[str, str]]:
    """The two sentences that share most with the question, each with its article. A rare word counts more."""
    sentences = [
        (article.id, sentence)
        for article in articles
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(article.text.split()))
    ]
    scores = dict.fromkeys(sentences, 0.0)
    for word in _key_words(question):
        stem = re.compile(r"\b" + re.sub(r"(ing|ed|es|s)$", "", word), re.IGNORECASE)
        holding = [quote for quote in sentences if stem.search(quote[1])]
        for quote in holding:
            scores[quote] += 1 / len(holding)
    best_first = sorted(sentences, key=lambda quote: -scores[quote])
    return [quote for quote in best_first[:2] if scores[quote] > 0]


def _key_words(text: str) -> list[str]:
    words = re.findall(r"[a-z][a-z-]+", _ORDER_NUMBER.sub(" ", text).lower())
    return list(dict.fromkeys(word for word in words if word not in _EMPTY_WORDS))[:12]


def _plain_answer(talk: _Conversation) -> str:
    tools = f" I was offered the tools {', '.join(talk.tools)}, and do not know how to use them." if talk.tools else ""
    return f'You asked: "{talk.question.strip()[:500]}".{tools} {SIGNATURE}'


def _data_in(text: str) -> str:
    """What a tool returned, without its markers and what is said beside it; or what was said in place of it."""
    marked = _DATA.search(text)
    return marked["text"] if marked else text


def _json(text: str) -> Any:
    """The text as JSON, or None where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None
