"""What each decision about a review will do, in a sentence for the person who decides."""

from app.domain.agent import Agent
from app.domain.review import DECISIONS, Decision, Review, ReviewKind, ReviewStatus
from app.domain.run import Run, RunStatus

Effects = dict[Decision, str]
"""A decision that is missing here is not possible, though the kind of review would allow it."""


def consequences(
    review: Review, run: Run, agent: Agent | None, *, others: int, worker: str | None
) -> list[tuple[Decision, str]]:
    """The decisions that are possible here, each with what it will do.

    `agent`: None where this release does not know it. `others`: reviews of the run that are open as well. `worker`: who
    began a call that is in doubt.
    """
    if review.status is not ReviewStatus.PENDING or run.status is not RunStatus.WAITING:
        return []
    goes_on = "the run goes on"
    if others:
        goes_on += " once its other open review is decided" if others == 1 else f" once its {others} others are decided"
    match review.kind:
        case ReviewKind.APPROVAL:
            effects = _of_approval(review, agent, goes_on)
        case ReviewKind.IN_DOUBT:
            effects = _of_doubt(review, worker, goes_on)
        case ReviewKind.QUESTION:
            effects = _of_question(goes_on)
        case ReviewKind.LIMIT:
            effects = _of_limit(review, run, agent, goes_on)
    return [
        (decision, effects[decision])
        for decision in Decision
        if decision in DECISIONS[review.kind] and decision in effects
    ]


_OR_END = "With end_run the run ends instead, as rejected."


def _of_approval(review: Review, agent: Agent | None, goes_on: str) -> Effects:
    tool = agent.tools_by_name.get(review.tool or "") if agent else None
    effects = {
        Decision.APPROVE: f"{review.tool} is called with exactly these arguments, and {goes_on}.",
        Decision.REJECT: f"{review.tool} is not called, the model is told your reason, and {goes_on}. {_OR_END}",
    }
    if tool is not None:
        again = " If they need approval too, a new review asks for it." if callable(tool.approval) else ""
        effects[Decision.EDIT] = (
            f"{tool.name} is called with your arguments in place of these, the model is told so, and {goes_on}.{again}"
        )
    return effects


def _of_doubt(review: Review, worker: str | None, goes_on: str) -> Effects:
    """`approve` and `reject` both say that it did not happen, which a worker that is still alive may prove wrong."""
    sure = f"Be sure that worker {worker or '(unknown)'}, which made the call, is gone: until then it may still happen."
    return {
        Decision.APPROVE: f"It did not happen: {review.tool} is called with these arguments, and {goes_on}. {sure}",
        Decision.REJECT: (
            f"It did not happen and is not to: {review.tool} is not called, the model is told your reason, "
            f"and {goes_on}. {_OR_END} {sure}"
        ),
        Decision.RESPOND: (
            f"It happened: {review.tool} is not called again, the model is given your response as its result, "
            f"and {goes_on}."
        ),
    }


def _of_question(goes_on: str) -> Effects:
    return {
        Decision.RESPOND: f"The model is given your response as the answer, and {goes_on}.",
        Decision.REJECT: f"The model is told that it gets no answer, and your reason, and {goes_on}. {_OR_END}",
    }


def _of_limit(review: Review, run: Run, agent: Agent | None, goes_on: str) -> Effects:
    assert isinstance(review.arguments, dict)
    ((name, proposed),) = review.arguments.items()
    present = getattr(run.limits, name)
    effects = {
        Decision.APPROVE: f"{name} is raised from {present} to {proposed}, and {goes_on}.",
        Decision.EDIT: f"{name} is raised from {present} to the value that you give, and {goes_on}.",
        Decision.REJECT: f"The run ends as failed, with the stop reason {review.stop_reason}.",
    }
    if agent is not None:
        fitting = f", JSON that fits what agent {agent.name} answers" if agent.output else ""
        effects[Decision.RESPOND] = f"The run ends as succeeded, with your response as its output{fitting}."
    return effects
