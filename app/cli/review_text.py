"""A review as its reviewer reads it. What the API left out is left out here."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from app.cli.text import WIDTH, call, clock, entry, in_short, indented, pretty, printable, span

Json = Mapping[str, Any]

TITLES = ("ID", "AGE", "AGENT", "KIND", "QUEUE", "STATUS", "DECIDE IN", "WHAT")
_THEN = {"end": "; then the run ends", "reject": "; then it is rejected", "escalate": "; then a second queue is asked"}


def row(review: Json, now: datetime) -> Sequence[str]:
    """For the table under `TITLES`."""
    left = datetime.fromisoformat(review["expires_at"]) - now
    is_open = review["status"] == "pending"
    return (
        review["id"],
        span(now - datetime.fromisoformat(review["created_at"])),
        printable(review["agent"]),
        review["kind"],
        review.get("queue") or "",
        review["status"],
        (span(left) if left > timedelta() else "now") if is_open else "",
        in_short(_what(review), 80),
    )


def _what(review: Json) -> str:
    """What it is about, in a line."""
    arguments = review["arguments"]
    if review["kind"] == "question" and isinstance(arguments, Mapping) and "question" in arguments:
        return str(arguments["question"])
    if review["tool"]:
        return call(review["tool"], arguments, WIDTH)
    return in_short(arguments, WIDTH)


def shown(review: Json, now: datetime) -> str:
    """All of it: what to know, what is possible, and the command that decides."""
    parts = [*proposal(review, now), *_background(review), *_possibilities(review)]
    return "\n\n".join(parts)


def proposal(review: Json, now: datetime) -> Iterator[str]:
    """Who asks, why, and for what."""
    yield "\n".join(f"{name:10} {printable(value)}" for name, value in _facts(review, now))
    if review.get("why"):
        yield f"Why you are asked\n{indented(review['why'])}"
    what = f"The call: {printable(review['tool'])}" if review["tool"] else "What is proposed"
    about = [indented(review["tool_description"])] if review.get("tool_description") else []
    yield "\n".join([what, *about, pretty(review["arguments"])])
    if review.get("edited") is not None:
        yield f"Changed by a person to\n{pretty(review['edited'])}"


def _facts(review: Json, now: datetime) -> Iterator[tuple[str, str]]:
    queue = f", {review['queue']} queue" if review.get("queue") else ""
    yield "Review", f"{review['id']}: {review['kind']}, {review['status']}{queue}"
    yield "Agent", f"{review['agent']}, run {review['run_id']}"
    age = now - datetime.fromisoformat(review["created_at"])
    yield "Asked", f"{clock(review['created_at'])}, {span(age)} ago"
    if review["status"] == "pending":
        left = datetime.fromisoformat(review["expires_at"]) - now
        when = f"in {span(left)}" if left > timedelta() else "over"
        yield "Until", f"{clock(review['expires_at'])}, {when}{_THEN.get(review.get('on_expiry', ''), '')}"
    if review.get("decision"):
        yield "Decided", f"{review['decision']} by {review['decided_by']}, {clock(review['decided_at'])}"
    for name, field in (("Reason", "reason"), ("Response", "response"), ("Worker", "worker")):
        if review.get(field):
            yield name, str(review[field])
    if review.get("barred"):
        yield "Not by", ", ".join(review["barred"])


def _background(review: Json) -> Iterator[str]:
    if review.get("run_input") is not None:
        run_input = review["run_input"]
        yield f"What the run was asked\n{indented(run_input) if isinstance(run_input, str) else pretty(run_input)}"
    if review.get("steps"):
        yield "\n".join(["The steps so far", *(_step(step) for step in review["steps"])])


def _step(step: Json) -> str:
    if step["kind"] == "model":
        wanted = " and ".join(asked["name"] for asked in step["tool_calls"])
        does = f"asks for {wanted}" if wanted else f"answers: {in_short(step.get('content') or '', WIDTH)}"
        return f"{step['seq']:4}  {printable(step['model'])} {printable(does)}"
    told = f"\n        {in_short(step['result'], WIDTH)}" if step.get("result") else ""
    return f"{step['seq']:4}  {call(step['tool'], step['arguments'], WIDTH)}: {step['state']}{told}"


def _possibilities(review: Json) -> Iterator[str]:
    """What each decision does; with it the hash that pins what was shown."""
    if review["status"] != "pending":
        return
    effects = [effect for effect in review.get("decisions") or () if "decision" in effect]
    if effects:
        lines = [entry(effect["decision"], effect.get("effect") or "") for effect in effects]
        yield "\n".join(["What a decision does", *lines])
    yield f"To decide\n  agent-service reviews decide {review['id']} DECISION \\\n    --args-hash {review['args_hash']}"


def effect_of(review: Json, decision: str) -> str | None:
    """What this decision will do, as the API says it."""
    effects = {effect.get("decision"): effect.get("effect") for effect in review.get("decisions") or ()}
    return entry(decision, effects[decision]) if effects.get(decision) else None
