"""What callers want of runs: submissions and cancellations. Postgres first, then Redis is told."""

import asyncio
from dataclasses import dataclass, replace
from decimal import Decimal
from uuid import UUID

from pydantic import JsonValue, ValidationError
from sqlalchemy.ext.asyncio import AsyncEngine

from app import signals
from app.db import budgets, runs
from app.db.engine import transactional
from app.db.runs import Allowance
from app.domain.agent import Agent, Limits
from app.domain.canonical import canonical_json, digest
from app.domain.errors import (
    BudgetSpent,
    FieldError,
    IdempotencyMismatch,
    InvalidRequest,
    LimitRaised,
    NotFound,
    RunEnded,
    TooManyRuns,
    UnknownAgent,
    UnpricedModel,
)
from app.domain.ids import new_id
from app.domain.pointer import MAX_ERRORS, field_errors, unstorable
from app.domain.principal import Principal
from app.domain.run import NewRun, Priority, Run, RunStatus
from app.enqueuer import Enqueuer
from app.prices import PriceTable
from app.registry import Registry, models_of
from app.signals import Signals

MARGIN = 100
"""So close to a key's limit of runs in flight, they are accepted one after the other. That many can be on their way at
the same moment: ten API processes, with ten connections each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A run that is asked for. Of `limits` only those count that were set; the others are the agent's."""

    agent: str
    input: JsonValue
    limits: Limits
    metadata: dict[str, str]
    priority: Priority
    idempotency_key: str | None
    request_id: str
    traceparent: str | None = None
    """W3C Trace Context of the caller: the run's trace is linked to it."""

    @property
    def hash(self) -> bytes:
        """SHA-256 of what was asked for: equal for the same request sent again."""
        limits = self.limits.model_dump(mode="json", exclude_unset=True)
        asked: list[JsonValue] = [self.agent, self.input, limits, dict(self.metadata), int(self.priority)]
        return bytes.fromhex(digest(asked))


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """Takes in what callers ask for, in the name of their tenant."""

    engine: AsyncEngine
    enqueuer: Enqueuer
    signals: Signals
    agents: Registry
    prices: PriceTable
    model: str | None
    """The setting `MODEL`: asked instead of every agent's own."""

    async def submit_run(self, caller: Principal, submission: Submission) -> tuple[Run, bool]:
        """Store a run and put it on the queue. True beside it: it was accepted before, under this idempotency key.

        Raises `UnknownAgent`, `LimitRaised`, `UnpricedModel`, `InvalidRequest`, `IdempotencyMismatch`, `TooManyRuns`,
        `BudgetSpent`.
        """
        try:
            new = self._validated(caller, submission)
        except InvalidRequest:
            # The agent may have changed meanwhile; the same request still gives the run that it gave then.
            if replayed := await self._accepted_before(caller, submission):
                return replayed, True
            raise
        allowance = Allowance(
            max_in_flight=caller.limits.max_in_flight - MARGIN, first_call_usd=self._first_call_usd(new)
        )
        run = None
        if allowance.max_in_flight > 0:
            async with self.engine.connect() as connection:
                run = await runs.accept(connection, new, allowance)
        if run is None:
            if replayed := await self._accepted_before(caller, submission):
                return replayed, True
            run = await self._accept_last(caller, new, allowance)
        if run is None:
            replayed = await self._accepted_before(caller, submission)
            assert replayed is not None
            return replayed, True
        # failpoint: after_accept
        self.enqueuer.put(run.id, run.priority)
        return run, False

    async def cancel_run(self, caller: Principal, run_id: UUID) -> Run:
        """End a run, whoever holds it. A cancelled run stays as it is.

        Raises `NotFound`, `RunEnded`.
        """
        async with self.engine.connect() as connection:
            run = await runs.cancel(connection, run_id, caller.tenant, actor=caller.actor)
            if run is None:
                return await self._ended(caller, run_id)
        # failpoint: after_cancel
        await asyncio.gather(
            self.signals.publish(signals.CANCELLED, run_id), self.signals.publish(signals.RESTED, run_id)
        )
        return run

    async def _accept_last(self, caller: Principal, new: NewRun, allowance: Allowance) -> Run | None:
        """Accept a run where there may be no room: one after the other, so that the limit is kept exactly.

        None: the same request was accepted meanwhile. Raises `BudgetSpent`, `TooManyRuns`, `UnpricedModel`.
        """
        most = caller.limits.max_in_flight
        async with transactional(self.engine).begin() as connection:
            await runs.hold_key(connection, caller.holder)
            if run := await runs.accept(connection, new, replace(allowance, max_in_flight=most)):
                return run
            if new.idempotency_key and await runs.find_by_idempotency_key(
                connection, caller.tenant, new.idempotency_key
            ):
                return None
            budget = await budgets.get(connection, caller.tenant)
        if budget and allowance.first_call_usd is None:
            raise UnpricedModel(
                "the tenant's budget cannot be kept: a model of this agent has no price. Add it to app/prices.toml"
            )
        if budget and allowance.first_call_usd is not None and budget.spent + allowance.first_call_usd > budget.daily:
            raise BudgetSpent(
                f"of today's {_dollars(budget.daily)} US dollars {_dollars(budget.daily - budget.spent)} are left,"
                " and that is not enough for a model call; the budget is renewed at midnight UTC",
                retry_after=budget.renewed_in,
            )
        raise TooManyRuns(f"{most} runs of this key are queued or running, and it may have no more", retry_after=2)

    def _first_call_usd(self, new: NewRun) -> Decimal | None:
        """What the first model call may cost, at least, whichever model answers. None: one of them has no price.

        Only a worker knows what exactly it will send; this much of it is known here.
        """
        agent = self.agents[new.agent]
        text = new.input if isinstance(new.input, str) else canonical_json(new.input)
        output_tokens = min(agent.max_output_tokens, new.limits.max_tokens)
        costs = []
        for model in models_of(agent, self.model):
            if (price := self.prices[model]) is None:
                return None
            # A token may stand for a long word; the worker counts generously, here it is the other way round.
            costs.append(price.at_most(input_tokens=len(text) // 8, output_tokens=output_tokens))
        return max(costs)

    async def _accepted_before(self, caller: Principal, submission: Submission) -> Run | None:
        if submission.idempotency_key is None:
            return None
        async with self.engine.connect() as connection:
            found = await runs.find_by_idempotency_key(connection, caller.tenant, submission.idempotency_key)
        if found is None:
            return None
        run, request_hash = found
        if request_hash != submission.hash:
            raise IdempotencyMismatch(
                f"this Idempotency-Key was used for another request, which became run {run.id}: "
                "use a new key for a new run"
            )
        return run

    def _validated(self, caller: Principal, submission: Submission) -> NewRun:
        agent = self.agents.get(submission.agent)
        if agent is None:
            raise UnknownAgent(
                f"there is no agent of this name; there is: {', '.join(sorted(self.agents)) or 'none'}",
                errors=(FieldError("#/agent", "no agent has this name"),),
            )
        limits = _lowered(agent, submission.limits)
        self._check_prices(agent, limits)
        return NewRun(
            id=new_id(),
            tenant=caller.tenant,
            api_key_id=caller.key_id,
            agent=agent.name,
            agent_version=agent.version,
            input=_valid_input(agent, submission.input),
            metadata=submission.metadata,
            limits=limits,
            priority=submission.priority,
            idempotency_key=submission.idempotency_key,
            request_hash=submission.hash,
            request_id=submission.request_id,
            traceparent=submission.traceparent,
        )

    def _check_prices(self, agent: Agent, limits: Limits) -> None:
        if limits.max_cost_usd is None:
            return
        unpriced = [model for model in models_of(agent, self.model) if self.prices[model] is None]
        if unpriced:
            raise UnpricedModel(
                f"max_cost_usd cannot be kept: there is no price for {', '.join(unpriced)}. "
                "Add it to app/prices.toml, or give the agent Limits(max_cost_usd=None)"
            )

    async def _ended(self, caller: Principal, run_id: UUID) -> Run:
        async with self.engine.connect() as connection:
            run = await runs.get(connection, run_id, caller.tenant)
        if run is None:
            raise NotFound("no such run")
        if run.status is not RunStatus.CANCELLED:
            raise RunEnded(f"the run has {run.status}: there is nothing to cancel")
        return run


def _valid_input(agent: Agent, value: JsonValue) -> JsonValue:
    try:
        stored = agent.validate_input(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise InvalidRequest(
            f"the input is not what agent {agent.name} takes", errors=field_errors(problems, "#/input")
        ) from None
    # The agent's own model may make values that the request did not hold: "nan" where it says float.
    if agent.input is not None and (faults := tuple(unstorable(stored, "#/input"))):
        raise InvalidRequest(f"the input is not what agent {agent.name} takes", errors=faults[:MAX_ERRORS])
    return stored


def _dollars(amount: Decimal) -> str:
    return f"{max(amount, Decimal(0)):.4f}"


def _lowered(agent: Agent, asked: Limits) -> Limits:
    """The agent's limits, with those that the request set."""
    wanted = {name: getattr(asked, name) for name in sorted(asked.model_fields_set)}
    raised = [name for name, value in wanted.items() if _is_above(value, getattr(agent.limits, name))]
    if raised:
        raise LimitRaised(
            f"above what agent {agent.name} allows: {', '.join(raised)}",
            errors=tuple(
                FieldError(f"#/limits/{name}", f"must be at most {getattr(agent.limits, name)}") for name in raised
            ),
        )
    return agent.limits.model_copy(update=wanted)


def _is_above(value: Decimal | float | None, allowed: Decimal | float | None) -> bool:
    return allowed is not None and (value is None or value > allowed)
