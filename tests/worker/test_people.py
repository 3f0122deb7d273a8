"""What a run does with what people say: about its calls, its model's questions, its limits. On real servers."""

import json
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest

from app.devstack.access import make_key
from app.domain.data import as_data
from tests.api.conftest import client_of
from tests.scripts import DONE, Reply, Run, Script, audit_of, call, calls, rest, say, steps_of, submit
from tests.stack import Stack

Json = dict[str, Any]


class Play:
    """A run of a script, and what people say to it."""

    def __init__(self, stack: Stack, client: httpx.Client, agent: str, replies: list[Reply], **more: Any) -> None:
        self.client = client
        self.script = Script(stack.model_url, replies)
        self.run: Run = rest(client, submit(client, agent, more.pop("input", self.script.input), **more))

    def reviews(self) -> list[Json]:
        """Those that wait for a decision, in the order of the calls that they are about."""
        found = self.client.get("/v1/reviews", params={"status": "pending", "limit": 100}).json()["data"]
        return sorted((each for each in found if each["run_id"] == self.run["id"]), key=lambda each: each["seq"] or 0)

    def review(self) -> Json:
        (review,) = self.reviews()
        return review

    def decide(self, decision: str, *, of: Json | None = None, by: httpx.Client | None = None, **more: Any) -> None:
        response = self.try_to_decide(decision, of=of, by=by, **more)
        assert response.status_code == 200, response.text

    def try_to_decide(
        self, decision: str, *, of: Json | None = None, by: httpx.Client | None = None, **more: Any
    ) -> httpx.Response:
        review = of or self.review()
        body = {"decision": decision, "args_hash": review["args_hash"], **more}
        return (by or self.client).post(f"/v1/reviews/{review['id']}/decision", json=body)

    def then(self) -> Run:
        """The run when it has come to rest again."""
        self.run = rest(self.client, self.run)
        return self.run

    def results(self) -> list[str]:
        """What the model was told of its calls, in order."""
        messages = self.script.requests()[-1]["messages"]
        return [message["content"] for message in messages if message["role"] == "tool"]


Begin = Callable[..., Play]


@pytest.fixture
def begin(stack: Stack, client: httpx.Client) -> Begin:
    return lambda agent, *replies, **more: Play(stack, client, agent, list(replies), **more)


# -- several calls in one reply


def test_free_calls_are_made_while_others_wait_and_the_model_sees_all_results_in_order(begin: Begin) -> None:
    wanted = calls(
        ("announce", {"text": "one"}),
        ("echo", {"text": "two"}),
        ("refund", {"order": "3", "amount": 60}),
        ("ask_human", {"question": "Four?"}),
        ("charge", {"amount": 5}),
        ("refund", {"order": "6", "amount": 61}),
    )
    play = begin("clerk", wanted, DONE)
    assert play.run["status"] == "waiting"
    assert [step["seq"] for step in steps_of(play.client, play.run)] == [0, 2, 5]  # the free ones, at once
    announce, refund, question, no_refund = play.reviews()
    assert [review["seq"] for review in play.reviews()] == [1, 3, 4, 6]

    play.decide("reject", of=no_refund, reason="not that one")
    play.decide("respond", of=question, response="yes, four")
    play.decide("approve", of=refund)
    assert len(play.script.requests()) == 1
    play.decide("approve", of=announce)

    run = play.then()
    assert run["status"] == "succeeded"
    assert play.results() == [
        as_data("announce", "told everybody: one"),
        as_data("echo", "two"),
        as_data("refund", f"refunded 60 for 3 as {run['id']}:3"),
        "yes, four",
        as_data("charge", f"charged 5 as {run['id']}:5"),
        "A person rejected this call: not that one",
    ]
    sent = play.script.requests()[-1]["messages"]
    asked = next(message["tool_calls"] for message in sent if message["role"] == "assistant")
    answered = [message["tool_call_id"] for message in sent if message["role"] == "tool"]
    assert answered == [each["id"] for each in asked]


def test_a_call_beside_one_that_waits_is_made_once(begin: Begin) -> None:
    play = begin("clerk", calls(("charge", {"amount": 5}), ("open_the_door", {})), DONE)
    play.decide("approve")
    assert play.then()["status"] == "succeeded"
    assert audit_of(play.client, play.run).count("tool.intended") == 1


def test_a_call_in_doubt_and_one_that_waits_are_asked_about_together(begin: Begin) -> None:
    play = begin("escalating", calls(("charge_and_crash", {"amount": 5}), ("open_the_door", {})), DONE)
    doubt, approval = play.reviews()
    assert (doubt["kind"], approval["kind"]) == ("in_doubt", "approval")
    assert "certain only when that worker is gone" in doubt["why"]
    assert approval["why"] == "The tool open_the_door asks for approval of every call."


# -- edits


def test_an_edited_call_is_made_as_it_was_edited_and_the_model_is_told(begin: Begin) -> None:
    play = begin("clerk", call("refund", {"order": "A", "amount": 60}), DONE)
    play.decide("edit", arguments={"order": "A", "amount": 50})
    run = play.then()
    assert run["status"] == "succeeded"
    assert play.results() == [
        'A person changed the arguments of this call to {"amount":"50","order":"A"}.\n'
        + as_data("refund", f"refunded 50 for A as {run['id']}:1")
    ]
    assert steps_of(play.client, run)[1]["result"] == f"refunded 50 for A as {run['id']}:1"
    assert steps_of(play.client, run)[1]["arguments"] == {"order": "A", "amount": "50"}


def test_an_edited_call_of_a_tool_that_wants_every_call_approved_is_asked_about_once(begin: Begin) -> None:
    play = begin("clerk", call("announce", {"text": "hi"}), DONE)
    play.decide("edit", arguments={"text": "hello"})
    assert play.then()["status"] == "succeeded"
    first, second = play.results()[0].split("\n", 1)
    assert first == 'A person changed the arguments of this call to {"text":"hello"}.'
    assert second == as_data("announce", "told everybody: hello")


def test_a_long_result_of_an_edited_call_still_begins_with_what_was_changed(begin: Begin) -> None:
    play = begin("clerk", call("announce_at_length", {"text": "hi"}), DONE)
    play.decide("edit", arguments={"text": "hello"})
    play.then()
    assert play.results() == [
        'A person changed the arguments of this call to {"text":"hello"}.\n'
        + as_data("announce_at_length", "hellohello\n[cut: 500 characters in all]")
    ]


def test_an_edit_that_needs_approval_is_asked_about_again(begin: Begin) -> None:
    play = begin("clerk", call("refund", {"order": "A", "amount": 60}), DONE)
    first = play.review()
    play.decide("edit", arguments={"order": "A", "amount": 70})
    assert play.then()["status"] == "waiting"
    second = play.review()
    assert second["arguments"] == {"order": "A", "amount": "70"}
    assert second["args_hash"] != first["args_hash"]
    assert [step["kind"] for step in steps_of(play.client, play.run)] == ["model"]

    play.decide("edit", arguments={"order": "A", "amount": 80})
    assert play.then()["status"] == "waiting"
    assert play.review()["arguments"] == {"order": "A", "amount": "80"}
    play.decide("approve")
    assert play.then()["status"] == "succeeded"
    first_line, _, result = play.results()[0].split("\n")[:3]
    assert '"amount":"80"' in first_line
    assert result.startswith("refunded 80 for A")
    assert audit_of(play.client, play.run).count("review.decided") == 3


def test_an_edit_that_is_rejected_is_not_made(begin: Begin) -> None:
    play = begin("clerk", call("refund", {"order": "A", "amount": 60}), DONE)
    play.decide("edit", arguments={"order": "A", "amount": 70})
    play.then()
    play.decide("reject", reason="neither")
    assert play.then()["status"] == "succeeded"
    assert play.results() == ["A person rejected this call: neither"]


def test_the_last_decision_counts_also_where_the_clock_of_the_worker_that_asked_first_is_ahead(
    stack: Stack, begin: Begin
) -> None:
    play = begin("clerk", call("refund", {"order": "A", "amount": 60}), DONE)
    with psycopg.connect(stack.owner_url, autocommit=True) as database:
        database.execute(
            "UPDATE reviews SET id = %s WHERE run_id = %s", [f"ffffffff-{uuid4().hex[8:]}", play.run["id"]]
        )
    play.decide("edit", arguments={"order": "A", "amount": 70})
    play.then()
    play.decide("reject", reason="neither")
    assert play.then()["status"] == "succeeded"
    assert play.results() == ["A person rejected this call: neither"]


def test_with_four_eyes_neither_the_submitter_nor_the_editor_decides(stack: Stack, begin: Begin, tenant: str) -> None:
    play = begin("pair", call("refund", {"order": "A", "amount": 60}), DONE)
    keys = [make_key(stack.database_url, tenant=tenant, name=name) for name in ("editor", "approver")]
    with client_of(stack.api, keys[0]) as editor, client_of(stack.api, keys[1]) as approver:
        assert play.try_to_decide("approve").status_code == 403
        play.decide("edit", by=editor, arguments={"order": "A", "amount": 70})
        assert play.then()["status"] == "waiting"
        assert play.try_to_decide("approve", by=editor).status_code == 403
        assert play.try_to_decide("approve").status_code == 403
        play.decide("approve", by=approver)
    assert play.then()["status"] == "succeeded"


def test_a_doubt_about_an_edited_call_is_about_the_edited_arguments(begin: Begin) -> None:
    play = begin("clerk", call("refund_and_crash", {"amount": 60}), DONE)
    play.decide("edit", arguments={"amount": 40})
    assert play.then()["status"] == "waiting"
    doubt = play.review()
    assert (doubt["kind"], doubt["arguments"]) == ("in_doubt", {"amount": "40"})
    play.decide("approve")  # it did not happen: it is made again, and fails again
    assert play.then()["status"] == "waiting"
    again = play.review()
    assert (again["kind"], again["arguments"]) == ("in_doubt", {"amount": "40"})
    play.decide("respond", response="it was refunded by hand")
    assert play.then()["status"] == "succeeded"
    assert play.results() == [
        'A person changed the arguments of this call to {"amount":"40"}.\nit was refunded by hand'
    ]


# -- questions


def test_the_model_asks_a_person_and_gets_the_answer(begin: Begin) -> None:
    play = begin("clerk", call("ask_human", {"question": "Which?", "options": ["left", "right"]}), DONE)
    review = play.review()
    assert (review["kind"], review["tool"]) == ("question", "ask_human")
    assert review["arguments"] == {"question": "Which?", "options": ["left", "right"]}
    assert review["why"] == "Which?"
    play.decide("respond", response="left, of course")
    assert play.then()["status"] == "succeeded"
    assert play.results() == ["left, of course"]
    assert steps_of(play.client, play.run)[1]["state"] == "succeeded"


def test_a_person_may_refuse_to_answer(begin: Begin) -> None:
    play = begin("clerk", call("ask_human", {"question": "What is your password?"}), DONE)
    play.decide("reject", reason="none of your business")
    assert play.then()["status"] == "succeeded"
    assert play.results() == ["A person does not answer: none of your business"]
    assert steps_of(play.client, play.run)[1]["state"] == "rejected"


def test_questions_count_as_calls(begin: Begin) -> None:
    play = begin("clerk", *[call("ask_human", {"question": "Again?"})] * 3, limits={"max_repeats": 2})
    for _ in range(2):
        play.decide("respond", response="yes")
        play.then()
    assert (play.run["status"], play.run["stop_reason"]) == ("failed", "loop_detected")


# -- nobody decides in time


def test_a_call_that_nobody_decides_is_not_made_and_the_model_is_told(stack: Stack, begin: Begin) -> None:
    wanted = calls(("open_the_door", {}), ("ask_human", {"question": "Who is there?"}), ("echo", {"text": "me"}))
    play = begin("unanswered", wanted, DONE)
    assert _ended(stack, play)["status"] == "succeeded"
    assert play.results() == [
        "Not called: nobody approved this call in time.",
        "Nobody answered in time.",
        as_data("echo", "me"),
    ]


@pytest.mark.parametrize(
    ("replies", "limits"),
    [([call("charge_and_crash", {"amount": 5})], {}), ([call("echo", {"text": "a"})], {"max_steps": 1})],
)
def test_a_doubt_and_a_limit_that_nobody_decides_end_the_run(
    stack: Stack, begin: Begin, replies: list[Reply], limits: Json
) -> None:
    play = begin("unanswered", *replies, DONE, limits=limits)
    assert _ended(stack, play)["stop_reason"] == "review_expired"


def _ended(stack: Stack, play: Play) -> Run:
    stack.until(lambda: play.client.get(f"/v1/runs/{play.run['id']}").json()["ended_at"])
    return play.then()


# -- limits

ECHOES = [call("echo", {"text": str(number)}) for number in range(20)]


def used(tokens: int) -> Json:
    return {"prompt_tokens": tokens, "completion_tokens": 0}


@pytest.mark.parametrize(
    ("replies", "limits", "proposed", "why"),
    [
        (ECHOES[:3], {"max_steps": 2}, {"max_steps": 4}, "max_steps: 2 of 2 model calls"),
        (
            [call("echo", {"text": "a"}, usage=used(90_000)), call("echo", {"text": "b"}, usage=used(20_000))],
            {},
            {"max_tokens": 200_000},
            "max_tokens: 110,000 of 100,000 tokens",
        ),
        (
            # 40,000 input tokens cost 1 cent: the second call might cost more than what is left.
            [call("echo", {"text": "a"}, usage=used(40_000))],
            {"max_cost_usd": 0.025},
            {"max_cost_usd": 0.05},
            "max_cost_usd: 0.0100 of 0.025 US dollars, and the next model call may cost up to 0.0",
        ),
        (
            [calls(*[("add", {"left": 1})] * 4)],
            {},
            {"max_repeats": 6},
            "max_repeats: the model asked 4 times for the same call, allowed: 3",
        ),
        (
            [call("nothing", {"try": number}) for number in range(2)],
            {"max_mistakes": 1},
            {"max_mistakes": 2},
            "max_mistakes: replies of no use in a row: 2, allowed: 1; of the last one, the tool calls were malformed",
        ),
        (
            [call("crash")],
            {"max_mistakes": 0},
            {"max_mistakes": 1},
            "max_mistakes: replies of no use in a row: 1, allowed: 0; of the last one, the tools failed unexpectedly",
        ),
        (
            [say("")] * 2,
            {"max_mistakes": 1},
            {"max_mistakes": 2},
            "max_mistakes: replies of no use in a row: 2, allowed: 1; of the last one, the answer could not be used",
        ),
    ],
    ids=["steps", "tokens", "cost", "repeats", "malformed calls", "crashed tools", "unusable answers"],
)
def test_a_run_that_reaches_a_limit_waits_and_goes_on_when_it_is_raised(
    begin: Begin, replies: list[Reply], limits: Json, proposed: Json, why: str
) -> None:
    play = begin("escalating", *replies, DONE, limits=limits)
    assert (play.run["status"], play.run["stop_reason"]) == ("waiting", None)
    review = play.review()
    assert (review["kind"], review["seq"], review["tool"]) == ("limit", None, None)
    assert review["arguments"] == proposed
    assert review["why"].startswith(f"The run has reached {why}")

    play.decide("approve")
    run = play.then()
    assert (run["status"], run["stop_reason"], run["output"]) == ("succeeded", "final_answer", "done")
    (name,) = proposed
    assert float(run["limits"][name]) == proposed[name]


def test_an_answer_that_did_not_fit_is_corrected_when_more_mistakes_are_allowed(begin: Begin, stack: Stack) -> None:
    script = Script(stack.model_url, [say("no JSON"), say('{"verdict": "good", "score": 9}')])
    play = begin("escalating-typed", input=script.input, limits={"max_mistakes": 0})
    assert play.run["status"] == "waiting"
    play.decide("approve")
    assert play.then()["output"] == {"verdict": "good", "score": 9}
    assert "does not fit the required JSON schema" in script.requests()[-1]["messages"][-1]["content"]


def test_a_deadline_waits_for_a_person_and_what_was_going_on_is_done_after_it(begin: Begin) -> None:
    play = begin("escalating", call("rest", {"seconds": 1.2}), DONE, limits={"deadline_s": 0.8})
    review = play.review()
    assert review["arguments"] == {"deadline_s": 2}
    assert review["why"].startswith("The run has reached deadline_s: 0.8 of 0.8 seconds of running time")
    play.decide("edit", arguments={"deadline_s": 20})
    assert play.then()["status"] == "succeeded"
    assert play.results() == [as_data("rest", "rested")]


def test_a_limit_that_is_reached_again_is_asked_about_again(begin: Begin) -> None:
    play = begin("escalating", *ECHOES[:6], DONE, limits={"max_steps": 2})
    for proposed in (4, 8):
        assert play.run["status"] == "waiting"
        assert play.review()["arguments"] == {"max_steps": proposed}
        play.decide("approve")
        play.then()
    assert play.run["status"] == "succeeded"
    assert play.run["usage"]["model_calls"] == 7


def test_calls_that_a_limit_held_back_are_made_when_it_is_raised(begin: Begin) -> None:
    wanted = calls(("charge", {"amount": 5}), ("open_the_door", {}))
    play = begin("escalating", wanted, DONE, limits={"max_steps": 1})
    assert play.review()["kind"] == "limit"
    assert [step["kind"] for step in steps_of(play.client, play.run)] == ["model"]
    play.decide("approve")
    assert play.then()["status"] == "waiting"
    assert play.review()["kind"] == "approval"
    play.decide("approve")
    run = play.then()
    assert play.results() == [as_data("charge", f"charged 5 as {run['id']}:1"), as_data("open_the_door", "open")]


def test_a_call_that_a_deadline_interrupts_stays_in_doubt_however_often(begin: Begin) -> None:
    """What was decided about the first doubt says nothing about the call that was made after it."""
    play = begin("escalating", call("charge_slowly", {"amount": 5}), DONE, limits={"deadline_s": 0.5})
    play.decide("edit", arguments={"deadline_s": 1.5})
    play.then()
    assert play.review()["kind"] == "in_doubt"
    play.decide("approve")  # it did not happen: it is made again, and interrupted again
    play.then()
    assert play.review()["kind"] == "limit"
    play.decide("edit", arguments={"deadline_s": 100})
    assert play.then()["status"] == "waiting"
    assert play.review()["kind"] == "in_doubt"
    assert audit_of(play.client, play.run).count("tool.intended") == 2
    play.decide("respond", response="charged")
    assert play.then()["status"] == "succeeded"


def test_an_agent_that_does_not_escalate_ends(begin: Begin) -> None:
    assert begin("toolbox", *ECHOES, limits={"max_steps": 2}).run["stop_reason"] == "max_steps"


def test_a_provider_that_refuses_is_no_limit(begin: Begin) -> None:
    run = begin("escalating", {"fault": "status:400"}).run
    assert (run["status"], run["stop_reason"]) == ("failed", "model_error")


def test_a_limit_is_lowered_by_nobody_and_its_rejection_ends_the_run_with_its_reason(begin: Begin) -> None:
    play = begin("escalating", *ECHOES, limits={"max_steps": 2})
    assert play.try_to_decide("edit", arguments={"max_steps": 1}).status_code == 422
    play.decide("reject", reason="enough")
    run = play.then()
    assert (run["status"], run["stop_reason"]) == ("failed", "max_steps")
    assert len(play.script.requests()) == 2


def test_what_a_person_sees_of_a_limit_is_in_the_audit(begin: Begin) -> None:
    play = begin("escalating", *ECHOES, limits={"max_steps": 2})
    events = play.client.get(f"/v1/runs/{play.run['id']}/audit").json()["data"]
    (asked,) = [event for event in events if event["kind"] == "review.requested"]
    assert (asked["data"]["kind"], asked["data"]["stop_reason"]) == ("limit", "max_steps")
    assert "model calls" not in json.dumps(asked["data"])
