"""What people decide about runs that wait for them. Postgres first, then Redis is told, and nobody waits for that."""

import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from pydantic import JsonValue, ValidationError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app import signals
from app.db import keys, reviews
from app.db.engine import transactional
from app.domain.agent import Limits
from app.domain.errors import (
    ArgumentsChanged,
    Conflict,
    FieldError,
    FourEyes,
    InvalidRequest,
    MissingScope,
    NotFound,
    ReviewDecided,
    ReviewExpired,
)
from app.domain.pointer import MAX_ERRORS, field_errors, in_words, pointer, unstorable
from app.domain.principal import Principal, Scope
from app.domain.review import DECISIONS, Decision, Review, ReviewKind, ReviewQueue, ReviewStatus
from app.domain.run import Run, RunStatus, StopReason
from app.enqueuer import Enqueuer
from app.logging import about_run
from app.registry import Registry
from app.signals import Signals

_SCOPE = {ReviewQueue.FIRST: Scope.REVIEWS_DECIDE, ReviewQueue.SECOND: Scope.REVIEWS_ESCALATED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a person decided about the arguments that `args_hash` pins.

    `arguments` go with `edit`, `response` with `respond`, `end_run` with `reject`.
    """

    decision: Decision
    args_hash: str
    reason: str | None = None
    arguments: dict[str, JsonValue] | None = None
    response: str | None = None
    end_run: bool = False


@dataclass(frozen=True, slots=True)
class _GoesOn:
    """Once nothing else is left to decide. `limits`: the new ones, where one was raised."""

    limits: Limits | None = None


@dataclass(frozen=True, slots=True)
class _Ends:
    reason: StopReason
    output: JsonValue = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Takes in decisions, each exactly once."""

    engine: AsyncEngine
    enqueuer: Enqueuer
    signals: Signals
    agents: Registry

    async def decide(self, caller: Principal, review_id: UUID, verdict: Verdict) -> Review:
        """Write down a decision and what follows from it, in one transaction: the run goes on, or ends.

        Raises `NotFound`, `MissingScope`, `FourEyes`, `InvalidRequest`, `ReviewDecided`, `ReviewExpired`,
        `ArgumentsChanged`, `Conflict`.
        """
        priority, ended = None, False
        async with transactional(self.engine).begin() as connection:
            seen = await reviews.get(connection, review_id, caller.tenant)
            if seen is None:
                raise NotFound("no such review")
            run = await reviews.lock_run(connection, seen.run_id)
            review = await reviews.get(connection, review_id, caller.tenant)
            assert review is not None
            _check_scope(caller, review)
            about_run(run.id)
            await _check_eyes(connection, caller, review)
            _check_verdict(review, verdict)
            if not _is_open(run, review, verdict):
                raise _too_late(run, review, verdict)
            outcome = self._outcome(run, review, verdict)
            decided = await reviews.decide(
                connection,
                review,
                verdict.decision,
                actor=caller.actor,
                args_hash=verdict.args_hash,
                edited=verdict.arguments,
                reason=verdict.reason,
                response=verdict.response,
            )
            if decided is None:
                raise _too_late(run, review, verdict)
            match outcome:
                case _GoesOn(limits):
                    if limits is not None:
                        await reviews.raise_limit(connection, run.id, limits)
                    priority = await reviews.resume_run(connection, run.id, actor=caller.actor)
                case _Ends(reason, output, error):
                    ended = await reviews.end_run(
                        connection, run.id, reason, actor=caller.actor, output=output, error=error
                    )
        # failpoint: after_decision
        if ended:
            self.signals.publish_soon(signals.RESTED, run.id)
        if priority is not None:
            self.enqueuer.put_back(run.id, priority)
        return decided

    def _outcome(self, run: Run, review: Review, verdict: Verdict) -> _GoesOn | _Ends:
        """Raises `InvalidRequest` where what the person wrote does not fit."""
        match review.kind, verdict.decision:
            case ReviewKind.LIMIT, Decision.APPROVE:
                return _GoesOn(_raised(run.limits, review, review.arguments))
            case ReviewKind.LIMIT, Decision.EDIT:
                return _GoesOn(_raised(run.limits, review, verdict.arguments))
            case ReviewKind.LIMIT, Decision.REJECT:
                return _Ends(review.stop_reason or StopReason.REJECTED, error=verdict.reason)
            case ReviewKind.LIMIT, Decision.RESPOND:
                return _Ends(StopReason.PERSON_ANSWERED, output=self._output(review, verdict.response or ""))
            case _, Decision.REJECT if verdict.end_run:
                return _Ends(StopReason.REJECTED, error=verdict.reason)
            case _, Decision.EDIT:
                self._check_arguments(review, verdict.arguments or {})
        return _GoesOn()

    def _check_arguments(self, review: Review, arguments: dict[str, JsonValue]) -> None:
        """Do they fit the tool, as they would if the model had written them?"""
        agent = self.agents.get(review.agent)
        tool = agent.tools_by_name.get(review.tool or "") if agent else None
        if tool is None:
            raise _unknown(f"the tool {review.tool} of agent {review.agent}", "other arguments cannot be checked")
        wrong = f"these are not arguments that {tool.name} takes"
        try:
            valid = tool.arguments.model_validate_json(json.dumps(arguments))
        except ValidationError as error:
            raise InvalidRequest(wrong, errors=field_errors(_problems(error), "#/arguments")) from None
        if faults := tuple(unstorable(valid.model_dump(mode="json"), "#/arguments")):
            raise InvalidRequest(wrong, errors=faults[:MAX_ERRORS])

    def _output(self, review: Review, response: str) -> JsonValue:
        """The person's answer as the run's output."""
        agent = self.agents.get(review.agent)
        if agent is None:
            raise _unknown(f"the agent {review.agent}", "an answer in its place cannot be checked")
        if agent.output is None:
            return response
        wrong = f"this is not what agent {agent.name} answers: JSON that fits its output"
        try:
            output: JsonValue = agent.output.model_validate_json(response).model_dump(mode="json")
        except ValidationError as error:
            places = (f"{pointer(problem['loc'], '')}: {in_words(problem)}" for problem in _problems(error))
            errors = tuple(FieldError("#/response", place.removeprefix(": ")) for place in places)
            raise InvalidRequest(wrong, errors=errors[:MAX_ERRORS]) from None
        if next(unstorable(output), None):
            raise InvalidRequest(wrong, errors=(FieldError("#/response", "holds what PostgreSQL does not store"),))
        return output


def _check_scope(caller: Principal, review: Review) -> None:
    """Raises `MissingScope` for the wrong queue."""
    needed = _SCOPE[review.queue]
    if not caller.has(needed):
        raise MissingScope(needed, f"the review is in the {review.queue} queue: the API key needs the scope {needed}")


async def _check_eyes(connection: AsyncConnection, caller: Principal, review: Review) -> None:
    """Raises `FourEyes` for somebody who has a part in it, with this key or with one that replaced or preceded it."""
    if not review.barred:
        return
    barred = await keys.holders_of(connection, [actor.removeprefix("key:") for actor in review.barred])
    if caller.actor in review.barred or caller.holder in barred:
        raise FourEyes("whoever holds this key submitted the run or edited the call, and the agent demands four eyes")


def _check_verdict(review: Review, verdict: Verdict) -> None:
    """Raises `InvalidRequest` for a decision that makes no sense for this review."""
    errors = []
    if verdict.decision not in DECISIONS[review.kind]:
        possible = " or ".join(sorted(DECISIONS[review.kind]))
        errors.append(FieldError("#/decision", f"for a review of kind {review.kind} must be {possible}"))
    if (verdict.arguments is not None) != (verdict.decision is Decision.EDIT):
        errors.append(FieldError("#/arguments", "goes with the decision edit, and only with it"))
    if (verdict.response is not None) != (verdict.decision is Decision.RESPOND):
        errors.append(FieldError("#/response", "goes with the decision respond, and only with it"))
    if verdict.end_run and verdict.decision is not Decision.REJECT:
        errors.append(FieldError("#/end_run", "goes with the decision reject only"))
    if errors:
        raise InvalidRequest("this cannot be decided here", errors=tuple(errors))


def _is_open(run: Run, review: Review, verdict: Verdict) -> bool:
    """Whether its time is over, only the database knows."""
    is_pending = review.status is ReviewStatus.PENDING and run.status is RunStatus.WAITING
    return is_pending and review.args_hash == verdict.args_hash


def _too_late(run: Run, review: Review, verdict: Verdict) -> Conflict:
    """Why a decision did not count."""
    if review.status is ReviewStatus.DECIDED:
        return ReviewDecided(f"the review was decided at {review.decided_at}: {review.decision}")
    if review.status is ReviewStatus.EXPIRED:
        return ReviewExpired(f"the review expired at {review.expires_at}")
    if review.status is ReviewStatus.VOID or run.status is not RunStatus.WAITING:
        return Conflict("the run has ended, there is nothing left to decide")
    if review.args_hash != verdict.args_hash:
        return ArgumentsChanged("args_hash is not that of the review: read it again before you decide")
    return ReviewExpired(f"the review expired at {review.expires_at}")


def _raised(limits: Limits, review: Review, wanted: JsonValue) -> Limits:
    """The run's limits, with the one that the review is about at its new value."""
    assert isinstance(review.arguments, dict)
    assert isinstance(wanted, dict)
    (name,) = review.arguments
    if set(wanted) != {name}:
        others = sorted(set(wanted) - {name})
        errors = [FieldError(pointer([other], "#/arguments"), f"this is about {name} only") for other in others]
        missing = [] if name in wanted else [FieldError(f"#/arguments/{name}", "must be there")]
        raise InvalidRequest(f"the run has reached its {name}", errors=(*missing, *errors)[:MAX_ERRORS])
    try:
        value = getattr(Limits.model_validate_json(json.dumps(wanted), strict=True), name)
    except ValidationError as error:
        errors_found = field_errors(_problems(error), "#/arguments")
        raise InvalidRequest(f"this is no {name}", errors=errors_found) from None
    present = getattr(limits, name)
    if value is None or present is None or value <= present:
        error_place = FieldError(f"#/arguments/{name}", f"must be greater than {present}")
        raise InvalidRequest("a limit that was reached can only be raised", errors=(error_place,))
    return limits.model_copy(update={name: value})


def _unknown(what: str, so: str) -> InvalidRequest:
    detail = f"this release does not know {what}, so {so}"
    return InvalidRequest(detail, errors=(FieldError("#/decision", "is not possible any more: approve or reject"),))


def _problems(error: ValidationError) -> list[Any]:
    return list(error.errors(include_url=False, include_context=False, include_input=False))
