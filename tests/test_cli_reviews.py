"""`agent-service reviews`: a person reads and decides with their own key, on the API of the stack."""

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import click
import click.testing
import httpx
import psycopg
import pytest
from click.testing import CliRunner

import app.cli
from app.cli.reviews import DECISIONS, KINDS, QUEUES, STATUSES
from app.cli.reviews import reviews as group
from app.cli.text import WIDTH, call, entry, in_short, indented, pretty, printable, span
from app.devstack.access import make_key
from app.devstack.ports import free_port
from app.domain.ids import first_id_at
from app.domain.principal import Scope
from app.domain.review import Decision, ReviewKind, ReviewQueue, ReviewStatus
from tests.scripts import DONE, Run, Script, rest, steps_of, submit
from tests.scripts import call as calling
from tests.stack import Stack, clean_env

Json = dict[str, Any]
Reviews = Callable[..., click.testing.Result]
REFUND = {"order": "A-1", "amount": "51.50"}


@pytest.fixture
def key(stack: Stack, tenant: str) -> str:
    """A reviewer's: it can neither read nor submit runs."""
    scopes = (Scope.REVIEWS_READ, Scope.REVIEWS_DECIDE)
    return make_key(stack.database_url, tenant=tenant, name="reviewer", scopes=scopes)


@pytest.fixture
def reviews(stack: Stack, key: str) -> Reviews:
    """Runs `agent-service reviews` in this process; `input` is what the person types."""
    runner = CliRunner(env={"AGENT_SERVICE_URL": stack.api.address, "AGENT_SERVICE_KEY": key})

    def run(*arguments: str, typed: str = "", **env: str) -> click.testing.Result:
        return runner.invoke(
            app.cli.cli,
            ["reviews", *arguments],
            input=typed,
            env=env,
            prog_name="agent-service",
            catch_exceptions=False,
        )

    return run


Ask = Callable[..., tuple[Run, Json]]


@pytest.fixture
def ask(stack: Stack, client: httpx.Client) -> Ask:
    """Starts a run that makes one call and waits for a person. Returns it, and the review."""

    def start(tool: str = "refund", arguments: Json = REFUND, *, text: str = "") -> tuple[Run, Json]:
        script = Script(stack.model_url, [calling(tool, arguments), DONE])
        run = rest(client, submit(client, "clerk", f"{script.input} {text}"))
        assert run["status"] == "waiting", run
        pending = client.get("/v1/reviews", params={"status": "pending"}).json()["data"]
        [review_id] = [review["id"] for review in pending if review["run_id"] == run["id"]]
        review: Json = client.get(f"/v1/reviews/{review_id}").json()
        return run, review

    return start


def one_line(result: click.testing.Result) -> str:
    """What a failed command said."""
    assert result.exit_code == 1, result.output
    [line] = result.stderr.splitlines()
    assert line.startswith("agent-service: ")
    return line.removeprefix("agent-service: ")


# -- list


def test_the_list_is_a_table_of_what_waits(reviews: Reviews, ask: Ask) -> None:
    _, first = ask()
    _, second = ask("ask_human", {"question": "Is it\nblue?"})
    titles, *rows = [re.split(r"  +", line, maxsplit=7) for line in reviews("list").stdout.splitlines()]
    assert titles == ["ID", "AGE", "AGENT", "KIND", "QUEUE", "STATUS", "DECIDE IN", "WHAT"]
    assert [row[0] for row in rows] == [second["id"], first["id"]]
    assert rows[0][2:] == ["clerk", "question", "first", "pending", "23 h", "Is it blue?"]
    assert rows[1][3] == "approval"
    assert rows[1][7] == 'refund(order="A-1", amount="51.50")'


def test_the_list_is_filtered(reviews: Reviews, ask: Ask) -> None:
    _, approval = ask()
    _, question = ask("ask_human", {"question": "Is it blue?"})

    def listed(*filters: str) -> set[str]:
        result = reviews("list", "--json", *filters)
        assert result.exit_code == 0, result.output
        return {review["id"] for review in json.loads(result.stdout)["data"]}

    both = {approval["id"], question["id"]}
    assert listed() == listed("--agent", "clerk") == listed("--queue", "first") == both
    assert listed("--agent", "toolbox") == listed("--queue", "second") == set()
    assert listed("--kind", "approval") == {approval["id"]}
    assert listed("--kind", "question") == {question["id"]}
    assert listed("--older-than", "1m") == set()
    assert reviews("decide", approval["id"], "approve", "--yes").exit_code == 0
    assert listed() == {question["id"]}
    assert listed("--status", "decided") == {approval["id"]}
    assert listed("--status", "all") == both


def test_what_is_older_is_listed(reviews: Reviews, ask: Ask, stack: Stack) -> None:
    _, review = ask()
    asked = datetime.now(UTC) - timedelta(minutes=61)
    older = UUID(int=first_id_at(asked.timestamp()).int + secrets.randbits(60))
    with psycopg.connect(stack.owner_url) as connection:
        connection.execute(
            "UPDATE reviews SET id = %s, created_at = %s WHERE id = %s", [older, asked, UUID(review["id"])]
        )
    assert str(older) in reviews("list", "--older-than", "1h").stdout
    assert str(older) not in reviews("list", "--older-than", "2h").stdout


COLUMNS = """
    SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute
    WHERE attrelid = 'reviews'::regclass AND attnum > 0 AND NOT attisdropped AND attname NOT IN ('id', 'status')
"""


def test_a_long_list_takes_several_pages_and_says_where_it_was_cut(reviews: Reviews, ask: Ask, stack: Stack) -> None:
    _, review = ask()
    with psycopg.connect(stack.owner_url) as connection:
        (columns,) = connection.execute(COLUMNS).fetchone() or ("",)
        connection.execute(
            f"INSERT INTO reviews (id, status, {columns}) SELECT gen_random_uuid(), 'void', {columns}"
            " FROM reviews, generate_series(1, 130) WHERE id = %s",
            [review["id"]],
        )
    whole = reviews("list", "--status", "all", "--limit", "131")
    assert len(set(whole.stdout.splitlines())) == 1 + 131
    assert whole.stderr == ""
    cut = reviews("list", "--status", "all", "--limit", "120")
    assert len(set(cut.stdout.splitlines())) == 1 + 120
    assert cut.stderr == "There are more than these 120: see --limit.\n"
    assert len(json.loads(reviews("list", "--status", "all", "--limit", "120", "--json").stdout)["data"]) == 120


# -- show


def test_a_review_is_shown_with_all_that_a_decision_needs(reviews: Reviews, ask: Ask, stack: Stack) -> None:
    run, review = ask(text="The pot is broken.")
    text = reviews("show", review["id"]).stdout
    assert text.startswith(f"Review     {review['id']}: approval, pending, first queue\n")
    for told in (
        f"Agent      clerk, run {run['id']}\n",
        "Z, in 23 h; then the run ends\n",
        f"Why you are asked\n{indented(review['why'])}\n",
        "The call: refund\n  Give money back; above 50 a person has to agree.\n",
        '{\n    "order": "A-1",\n    "amount": "51.50"\n  }',
        "The pot is broken.",
        "The steps so far\n   0  gpt-5-mini asks for refund\n",
        f"agent-service reviews decide {review['id']} DECISION \\\n    --args-hash {review['args_hash']}\n",
    ):
        assert told in text
    assert {each["decision"] for each in review["decisions"]} == {"approve", "edit", "reject"}
    for each in review["decisions"]:
        assert entry(each["decision"], each["effect"]) in text


def test_json_is_what_the_api_says(reviews: Reviews, ask: Ask) -> None:
    _, review = ask()
    assert json.loads(reviews("show", review["id"], "--json").stdout) == review
    assert [each["id"] for each in json.loads(reviews("list", "--json").stdout)["data"]] == [review["id"]]


def test_a_decided_review_shows_who_decided_and_no_way_to_decide(reviews: Reviews, ask: Ask, key: str) -> None:
    _, review = ask()
    reviews("decide", review["id"], "reject", "--reason", "no receipt", "--yes")
    text = reviews("show", review["id"]).stdout
    assert f"Decided    reject by key:{key.split('_')[1]}, " in text
    assert "Reason     no receipt\n" in text
    assert "To decide" not in text


# -- decide


def test_a_confirmed_approval_is_made_in_the_name_of_the_key(
    reviews: Reviews, ask: Ask, client: httpx.Client, key: str
) -> None:
    run, review = ask()
    result = reviews("decide", review["id"], "approve", "--reason", "seen it", typed="y\n")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "refund" in result.stderr
    assert '"amount": "51.50"' in result.stderr
    assert "What your decision does\n  approve  refund is called with exactly these arguments" in result.stderr
    assert "approve? [y/N]" in result.stderr
    assert result.stderr.endswith(f"Review {review['id']} is decided: approve.\n")
    decided = client.get(f"/v1/reviews/{review['id']}").json()
    assert (decided["decision"], decided["reason"]) == ("approve", "seen it")
    assert decided["decided_by"] == f"key:{key.split('_')[1]}"
    assert rest(client, run)["status"] == "succeeded"


@pytest.mark.parametrize("typed", ["n\n", "\n", ""])
def test_without_confirmation_nothing_is_decided(reviews: Reviews, ask: Ask, client: httpx.Client, typed: str) -> None:
    _, review = ask()
    assert reviews("decide", review["id"], "approve", typed=typed).exit_code == 1
    assert client.get(f"/v1/reviews/{review['id']}").json()["status"] == "pending"


def test_an_edit_shows_and_sends_other_arguments(reviews: Reviews, ask: Ask, client: httpx.Client) -> None:
    run, review = ask()
    changed = json.dumps({**REFUND, "amount": "20.00"})
    result = reviews("decide", review["id"], "edit", "--arguments", changed, "--reason", "only half", typed="y\n")
    assert result.exit_code == 0, result.stderr
    assert 'With your arguments instead\n  {\n    "order": "A-1",\n    "amount": "20.00"\n  }' in result.stderr
    assert rest(client, run)["status"] == "succeeded"
    assert "refunded 20.00 for A-1" in steps_of(client, run)[1]["result"]


def test_arguments_that_do_not_fit_are_one_line_that_names_the_place(reviews: Reviews, ask: Ask) -> None:
    _, review = ask()
    result = reviews("decide", review["id"], "edit", "--arguments", '{"order": 1, "amount": "a lot"}', "--yes")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("agent-service: ")
    assert "; #/arguments/order " in last
    assert "; #/arguments/amount " in last


def test_a_rejection_may_end_the_run(reviews: Reviews, ask: Ask, client: httpx.Client) -> None:
    run, review = ask()
    assert reviews("decide", review["id"], "reject", "--reason", "no", "--end-run", "--yes").exit_code == 0
    assert rest(client, run)["stop_reason"] == "rejected"


def test_a_question_is_answered(reviews: Reviews, ask: Ask, client: httpx.Client) -> None:
    run, review = ask("ask_human", {"question": "Is it blue?"})
    assert reviews("decide", review["id"], "respond", "--response", "It is green.", "--yes").exit_code == 0
    assert rest(client, run)["status"] == "succeeded"
    assert steps_of(client, run)[1]["result"] == "It is green."


def test_the_hash_of_an_earlier_look_pins_what_is_decided(reviews: Reviews, ask: Ask, client: httpx.Client) -> None:
    _, review = ask()
    other = "0" * 64
    shown = one_line(reviews("decide", review["id"], "approve", "--args-hash", other, typed="y\n"))
    assert "something else than what --args-hash pins" in shown
    blind = one_line(reviews("decide", review["id"], "approve", "--args-hash", other, "--yes"))
    assert blind.startswith("These are not the arguments that were decided on: ")
    assert client.get(f"/v1/reviews/{review['id']}").json()["status"] == "pending"
    assert reviews("decide", review["id"], "approve", "--args-hash", review["args_hash"], "--yes").exit_code == 0


def test_a_key_that_may_only_decide_needs_the_hash_of_what_was_seen(
    reviews: Reviews, ask: Ask, stack: Stack, tenant: str
) -> None:
    _, review = ask()
    key = make_key(stack.database_url, tenant=tenant, name="decides", scopes=[Scope.REVIEWS_DECIDE])
    refused = one_line(reviews("decide", review["id"], "approve", "--yes", AGENT_SERVICE_KEY=key))
    assert "reviews:read" in refused
    result = reviews(
        "decide", review["id"], "approve", "--yes", "--args-hash", review["args_hash"], AGENT_SERVICE_KEY=key
    )
    assert result.exit_code == 0


def test_nobody_decides_twice(reviews: Reviews, ask: Ask) -> None:
    _, review = ask()
    assert reviews("decide", review["id"], "approve", "--yes").exit_code == 0
    again = one_line(reviews("decide", review["id"], "reject", "--yes"))
    assert again == "there is nothing to decide: this review is decided"
    blind = one_line(reviews("decide", review["id"], "reject", "--yes", "--args-hash", review["args_hash"]))
    assert blind.startswith("Somebody has decided already: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "42"),
        ("decide", str(uuid4()), "maybe"),
        ("decide", str(uuid4()), "approve", "--arguments", "{}"),
        ("decide", str(uuid4()), "approve", "--response", "yes"),
        ("decide", str(uuid4()), "approve", "--end-run"),
        ("decide", str(uuid4()), "edit"),
        ("decide", str(uuid4()), "edit", "--arguments", "{"),
        ("decide", str(uuid4()), "edit", "--arguments", '{"amount": NaN}'),
        ("decide", str(uuid4()), "respond"),
        ("list", "--kind", "odd"),
        ("list", "--older-than", "yesterday"),
        ("list", "--limit", "0"),
        *(("list", "--url", url) for url in ("api", "ftp://x", "http://", "http://x:y", "http://x?y", "http://k@x")),
        ("list", "--key-file", "/no/such/file"),
    ],
)
def test_wrong_usage_is_exit_code_2(reviews: Reviews, arguments: tuple[str, ...]) -> None:
    result = reviews(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


# -- whose key, which API


def test_no_option_takes_the_key_itself() -> None:
    parameters = [parameter.name for command in group.commands.values() for parameter in command.params]
    assert {name for name in parameters if "key" in str(name)} == {"key_file"}


def test_a_file_may_hold_the_key(reviews: Reviews, ask: Ask, key: str, tmp_path: Path) -> None:
    _, review = ask()
    file = tmp_path / "key"
    file.write_text(f"{key}\n")
    result = reviews("list", "--key-file", str(file), AGENT_SERVICE_KEY="ask_wrong")
    assert review["id"] in result.stdout


@pytest.mark.parametrize("content", ["", "\n", "two words", "kéy", "a\nb"])
def test_what_is_no_key_is_not_sent(reviews: Reviews, tmp_path: Path, content: str) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    assert reviews("list", "--key-file", str(file)).exit_code == 2
    assert reviews("list", AGENT_SERVICE_KEY=content).exit_code == 2


def test_refusals_are_one_line(reviews: Reviews) -> None:
    assert one_line(reviews("show", str(uuid4()))) == "Not found: no such review"
    unknown = one_line(reviews("list", AGENT_SERVICE_KEY="ask_0123456789ab_x"))
    assert unknown.startswith("A valid API key is needed: ")


def test_another_tenants_review_is_not_there(reviews: Reviews, ask: Ask, stack: Stack) -> None:
    _, review = ask()
    other = make_key(stack.database_url, tenant="somebody-else", name="reviewer")
    assert one_line(reviews("show", review["id"], AGENT_SERVICE_KEY=other)) == "Not found: no such review"
    assert review["id"] not in reviews("list", AGENT_SERVICE_KEY=other).stdout


def test_an_api_that_is_away_is_one_line_that_says_where(reviews: Reviews) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert one_line(reviews("list", "--url", url)) == f"the API at {url} does not answer: Connection refused"


def test_a_server_that_is_not_the_api_is_one_line(reviews: Reviews, stack: Stack) -> None:
    line = one_line(reviews("list", "--url", stack.model_url))
    assert line.startswith(f"what answers at {stack.model_url} is not this service's API")


def test_the_address_is_that_of_an_api_on_this_machine_by_default(stack: Stack, key: str) -> None:
    port = stack.api.address.rpartition(":")[2]
    command = [sys.executable, "-m", "app", "reviews", "list"]
    env = clean_env(API_PORT=port, AGENT_SERVICE_KEY=key, AGENT_SERVICE_URL="")
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("ID ")


def test_an_address_may_have_a_path(reviews: Reviews, stack: Stack) -> None:
    assert reviews("list", "--url", f"{stack.api.address}/").exit_code == 0
    assert one_line(reviews("list", "--url", f"{stack.api.address}/below")).startswith("Not found: ")


# -- what others wrote

ODD = "\x1b]0;owned\x07 \x9b31m \u202eevil\u202c \x00 \u2028 \r gone \U000e0041 tab\t."
COMMANDS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")


def test_no_text_of_a_model_or_customer_gives_the_terminal_orders(reviews: Reviews, ask: Ask) -> None:
    odd = ODD.replace("\x00", "")
    _, review = ask("ask_human", {"question": odd}, text=odd)
    for arguments in (
        ("list",),
        ("list", "--json"),
        ("show", review["id"]),
        ("show", review["id"], "--json"),
        ("decide", review["id"], "respond", "--response", "blue", "--reason", odd, "--yes"),
        ("show", review["id"]),
    ):
        result = reviews(*arguments)
        assert result.exit_code == 0, result.output
        assert COMMANDS.findall(result.output) == [], arguments
        assert "owned" in result.output


def test_text_of_others_stays_readable() -> None:
    assert printable("Zoë kauft 3\u00a0Töpfe für 5 €, 日本語 🫖") == "Zoë kauft 3\u00a0Töpfe für 5 €, 日本語 🫖"
    assert printable("a\nb\x1b[2J\u202e") == "a\\nb\\x1b[2J\\u202e"
    assert COMMANDS.search(printable(ODD) + pretty({"a": ODD}) + indented(ODD) + in_short(ODD, 99)) is None
    assert indented("one\ntwo") == "  one\n  two"
    assert max(map(len, indented("word " * 100).splitlines())) <= WIDTH


def test_what_is_long_is_cut() -> None:
    assert in_short("x" * 20, 10) == "x" * 9 + "…"
    assert in_short("x" * 10, 10) == "x" * 10
    assert call("pay", {"amount": 5, "to": "é"}, 80) == 'pay(amount=5, to="é")'
    assert call("pay", "{broken", 80) == "pay({broken)"


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (timedelta(seconds=0), "0 s"),
        (timedelta(seconds=59.4), "59 s"),
        (timedelta(seconds=-60), "1 min"),
        (timedelta(minutes=119), "1 h"),
        (timedelta(hours=47), "1 d"),
    ],
)
def test_a_span_is_told_in_its_largest_unit(length: timedelta, text: str) -> None:
    assert span(length) == text


def test_the_choices_are_those_of_the_service() -> None:
    assert set(KINDS) == set(ReviewKind)
    assert set(QUEUES) == set(ReviewQueue)
    assert set(STATUSES) == set(ReviewStatus)
    assert set(DECISIONS) == set(Decision)
