"""What a run asks people: one function for each kind of review, each with the sentence that tells them why."""

from pydantic import JsonValue

from app.domain.canonical import digest
from app.domain.review import ReviewKind, ReviewRequest
from app.domain.run import StopReason
from app.domain.step import ToolStep
from app.domain.tool import Tool


def approval(tool: Tool, step: ToolStep, *, editor: str | None) -> ReviewRequest:
    """May this call be made? `editor`: who gave it these arguments, where they are not the model's."""
    which = "calls like this one" if callable(tool.approval) else "every call"
    edited = " A person has changed its arguments." if editor else ""
    why = f"The tool {tool.name} asks for approval of {which}.{edited}"
    return _about_call(ReviewKind.APPROVAL, step, why, editor=editor)


def question(step: ToolStep) -> ReviewRequest:
    """What the model wants to know of a person."""
    assert isinstance(step.arguments, dict)
    return _about_call(ReviewKind.QUESTION, step, str(step.arguments["question"]))


def in_doubt(step: ToolStep) -> ReviewRequest:
    """Did this call happen?"""
    return _about_call(
        ReviewKind.IN_DOUBT,
        step,
        "The call was begun, and what became of it is not known: its worker died, or the tool failed in the middle. "
        "Its worker may still be alive: that the call did not happen is certain only when that worker is gone.",
    )


def limit(reason: StopReason, proposed: dict[str, JsonValue], why: str) -> ReviewRequest:
    """May the run go on with this limit? If not, it ends for this reason."""
    return ReviewRequest(
        kind=ReviewKind.LIMIT,
        seq=None,
        tool=None,
        arguments=proposed,
        args_hash=_pin(None, proposed),
        why=why,
        stop_reason=reason,
    )


def _about_call(kind: ReviewKind, step: ToolStep, why: str, *, editor: str | None = None) -> ReviewRequest:
    return ReviewRequest(
        kind=kind,
        seq=step.seq,
        tool=step.tool,
        arguments=step.arguments,
        args_hash=_pin(step.tool, step.arguments),
        why=why,
        editor=editor,
    )


def _pin(tool: str | None, arguments: JsonValue) -> str:
    return digest({"tool": tool, "arguments": arguments})
