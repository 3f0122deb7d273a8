"""Reviews: what waits for a person, and the person's decision, through the HTTP API with their own key."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult
from uuid import UUID

import click

from app.cli import review_text
from app.cli.client import Client, api_options, connect
from app.cli.duration import Duration
from app.cli.failure import fail
from app.cli.table import print_table
from app.cli.text import pretty

KINDS = ("approval", "in_doubt", "question", "limit")
QUEUES = ("first", "second")
STATUSES = ("pending", "decided", "expired", "void")
DECISIONS = ("approve", "edit", "reject", "respond")
_PAGE = 100

Json = dict[str, Any]


@click.group()
def reviews() -> None:
    """Reviews: what waits for a person's decision."""


@reviews.command(name="list")
@click.option("--agent", help="Only reviews of this agent's runs.")
@click.option("--kind", type=click.Choice(KINDS), help="Only reviews of this kind.")
@click.option("--queue", type=click.Choice(QUEUES), help="Only what the first, or the second queue is asked.")
@click.option("--status", type=click.Choice([*STATUSES, "all"]), default="pending", show_default=True)
@click.option("--older-than", type=Duration(), help="Only what was asked longer ago: 30m, 12h, 7d.")
@click.option("--limit", type=click.IntRange(1, 1_000), default=50, show_default=True, help="So many at most.")
@click.option("--json", "as_json", is_flag=True, help="Print what the API answers.")
@api_options
def list_reviews(
    *,
    agent: str | None,
    kind: str | None,
    queue: str | None,
    status: str,
    older_than: timedelta | None,
    limit: int,
    as_json: bool,
    url: SplitResult,
    key_file: Path | None,
) -> None:
    """Reviews, the newest first."""
    filters = {
        "agent": agent,
        "kind": kind,
        "queue": queue,
        "status": None if status == "all" else status,
        "older_than": int(older_than.total_seconds()) if older_than else None,
    }
    found = _list(connect(url, key_file), filters, limit)
    if as_json:
        _print_json(found)
        return
    now = datetime.now(UTC)
    print_table(review_text.TITLES, [review_text.row(review, now) for review in found["data"]])
    if found["next_cursor"]:
        click.echo(f"There are more than these {limit}: see --limit.", err=True)


@reviews.command()
@click.argument("review_id", metavar="ID", type=click.UUID)
@click.option("--json", "as_json", is_flag=True, help="Print what the API answers.")
@api_options
def show(review_id: UUID, as_json: bool, url: SplitResult, key_file: Path | None) -> None:
    """What is proposed, why it was stopped, the steps so far, and what each decision will do."""
    review = connect(url, key_file).get(f"/v1/reviews/{review_id}")
    if as_json:
        _print_json(review)
    else:
        click.echo(review_text.shown(review, datetime.now(UTC)))


@reviews.command()
@click.argument("review_id", metavar="ID", type=click.UUID)
@click.argument("decision", type=click.Choice(DECISIONS))
@click.option("--reason", help="Why; with a rejection the model is told.")
@click.option("--arguments", metavar="JSON", help="With edit: the arguments in place of those proposed.")
@click.option("--response", metavar="TEXT", help="With respond: the answer.")
@click.option("--end-run", is_flag=True, help="With reject: the run ends.")
@click.option("--args-hash", metavar="HASH", help="From an earlier `show`: what you saw is what you decide about.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@api_options
def decide(
    *,
    review_id: UUID,
    decision: str,
    reason: str | None,
    arguments: str | None,
    response: str | None,
    end_run: bool,
    args_hash: str | None,
    yes: bool,
    url: SplitResult,
    key_file: Path | None,
) -> None:
    """Decide a review, once: approve, edit, reject or respond.

    Shows what is decided and asks for confirmation. The decision holds for what was shown, and for nothing else.
    """
    _check_options(decision, arguments=arguments, response=response, end_run=end_run)
    verdict: Json = {"decision": decision, "reason": reason, "response": response}
    if arguments is not None:
        verdict["arguments"] = _parsed(arguments)
    if end_run:
        verdict["end_run"] = True
    client = connect(url, key_file)
    if not (yes and args_hash):
        review = client.get(f"/v1/reviews/{review_id}")
        if args_hash not in (None, review["args_hash"]):
            fail("this review asks about something else than what --args-hash pins: `show` it again")
        args_hash = review["args_hash"]
        _tell(review, verdict)
        if not yes:
            click.confirm(f"\n{decision}?", abort=True, err=True)
    said = {name: value for name, value in verdict.items() if value is not None}
    decided = client.post(f"/v1/reviews/{review_id}/decision", {**said, "args_hash": args_hash})
    click.echo(f"Review {review_id} is decided: {decided['decision']}.", err=True)


def _list(client: Client, filters: Mapping[str, object], limit: int) -> Json:
    """So many reviews at most, over as many pages as that takes; in the shape of one."""
    found: list[Json] = []
    cursor: str | None = None
    while True:
        page = client.get("/v1/reviews", **filters, limit=min(_PAGE, limit - len(found)), cursor=cursor)
        found += page["data"]
        cursor = page["next_cursor"]
        if cursor is None or len(found) >= limit:
            return {"data": found, "next_cursor": cursor}


def _check_options(decision: str, *, arguments: str | None, response: str | None, end_run: bool) -> None:
    """Each belongs to one decision; and what an edit or an answer is must be said."""
    for option, value, belongs_to, is_needed in (
        ("--arguments", arguments, "edit", True),
        ("--response", response, "respond", True),
        ("--end-run", end_run or None, "reject", False),
    ):
        if value is not None and decision != belongs_to:
            raise click.UsageError(f"{option} goes with {belongs_to} only.")
        if value is None and decision == belongs_to and is_needed:
            raise click.UsageError(f"{decision} needs {option}.")


def _parsed(arguments: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(arguments, parse_constant=refuse)
    except ValueError as error:
        raise click.BadParameter(f"is not JSON: {error}", param_hint="--arguments") from None


def _tell(review: Json, verdict: Json) -> None:
    """What is about to be decided."""
    if review["status"] != "pending":
        fail(f"there is nothing to decide: this review is {review['status']}")
    parts = list(review_text.proposal(review, datetime.now(UTC)))
    if "arguments" in verdict:
        parts.append(f"With your arguments instead\n{pretty(verdict['arguments'])}")
    if effect := review_text.effect_of(review, verdict["decision"]):
        parts.append(f"What your decision does\n{effect}")
    click.echo("\n\n".join(parts), err=True)


def _print_json(answer: Json) -> None:
    """Escaped to ASCII: a terminal takes no orders from it."""
    click.echo(json.dumps(answer, indent=2))
