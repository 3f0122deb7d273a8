"""From a run's id to its next rest: claim, run the loop, write down how it ended.

The only place where an outcome becomes a transition.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from uuid import UUID

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine

from app.background import in_background, within
from app.db import leases, reviews, runs, steps
from app.domain.agent import Agent
from app.domain.build import Build
from app.domain.canonical import digest
from app.domain.errors import LeaseLost, ModelError, OverBudget
from app.domain.review import Review
from app.domain.run import Claim, Priority, Run, StopReason
from app.logging import bind
from app.prices import PriceTable
from app.registry import models_of
from app.signals import RESTED, Signals
from worker.budget import WithinBudget
from worker.journal import RunJournal
from worker.lease import Held, Interruption, Leases, local_now
from worker.limits import most_output_tokens
from worker.llm.base import Model, ModelRequest
from worker.llm.retry import Answer, RetryPolicy, complete
from worker.loop import Answered, HandedBack, Outcome, Stopped, Suspended, run_loop, stopped_by
from worker.observer import Observer, RunObserver
from worker.state import RunState
from worker.tools.call import ToolCaller
from worker.transcript import transcript

logger = logging.getLogger(__name__)

INTERRUPT_SECONDS = 1.0
"""Of a drain's time, what interrupted runs get to write down what they know and hand themselves back."""
FORCE_SECONDS = 0.5
"""The same, for handing back those that did not."""


@dataclass(frozen=True, slots=True)
class ModelAsker:
    """Asks for a run's next reply, through the one layer that retries."""

    provider: Model
    policy: RetryPolicy
    random: Random
    watched: Callable[[Model, RunState], Model] = lambda model, _state: model
    """The provider with somebody who watches what it is asked for this step."""

    async def ask(self, state: RunState) -> Answer:
        request = ModelRequest(
            model=state.models[0],
            messages=transcript(state),
            tools=state.agent.tools,
            output=state.agent.output,
            max_output_tokens=most_output_tokens(state),
            timeout_s=state.agent.model_timeout_s,
        )
        return await complete(
            self.watched(self.provider, state),
            request,
            state.models,
            time_left=state.time_left,
            policy=self.policy,
            random=self.random,
        )


class Executor:
    """Executes runs, many at a time. `worker` is this process' name in leases and audit."""

    def __init__(
        self,
        *,
        worker: str,
        engine: AsyncEngine,
        held: Leases,
        agents: Mapping[str, Agent],
        model_override: str | None,
        prices: PriceTable,
        asker: ModelAsker,
        caller: ToolCaller,
        signals: Signals,
        observer: Observer,
        build: Build,
    ) -> None:
        self._worker = worker
        self._actor = f"worker:{worker}"
        self._engine = engine
        self._leases = held
        self._agents = agents
        self._model_override = model_override
        self._prices = prices
        self._asker = asker
        self._caller = caller
        self._signals = signals
        self._observer = observer
        self._build = build
        self._draining = False
        self._executing: set[asyncio.Task[object]] = set()

    async def execute(self, run_id: UUID) -> Priority | None:
        """Take a run as far as it goes. A priority: it was handed back, and has to be enqueued again with that.

        Never raises for what a run does. When Postgres is away the run is left as it is: its lease expires, and it
        goes on from its last recorded step.
        """
        task = asyncio.current_task()
        assert task is not None
        self._executing.add(task)
        task.add_done_callback(self._executing.discard)
        with bind(run_id=str(run_id), worker=self._worker):
            try:
                return await self._execute(run_id)
            except LeaseLost:
                logger.info("run is not ours any more")
                await self._leases.count_loss(run_id)
            except (DBAPIError, PoolTimeout) as error:
                logger.warning("Postgres failed; the run is left to its lease", extra={"fields": {"error": str(error)}})
            return None

    async def cancel(self, run_id: UUID) -> None:
        """End a run that is executed here: `rq`'s stop-job."""
        held = self._leases.held.get(run_id)
        if held is None:
            return
        async with self._engine.connect() as connection:
            await runs.cancel(connection, run_id, held.claim.run.tenant, actor=self._actor)
        self._leases.drop(run_id)
        await self._signals.publish(RESTED, run_id)

    async def drain(self, seconds: float, *, hurried: asyncio.Event) -> Sequence[tuple[UUID, Priority]]:
        """Bring every run to rest in Postgres within `seconds`; without waiting for any, once `hurried` is set.

        A run is handed back after its next commit. What takes longer is interrupted. What does not heed that, because
        a tool swallows it, is handed back over the head of its task, which can write nothing any more. Those have to be
        enqueued again: returned.
        """
        self._draining = True
        if not self._executing:
            return ()
        logger.info("draining", extra={"fields": {"runs": len(self._executing), "seconds": seconds}})
        # failpoint: drain_begun
        async with in_background(self._all_at_rest()) as rest, in_background(hurried.wait()) as hurry:
            patience = max(0.0, seconds - INTERRUPT_SECONDS - FORCE_SECONDS)
            await asyncio.wait([rest, hurry], timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for held in list(self._leases.held.values()):
                held.interrupt(Interruption.DRAIN)
            # failpoint: drain_cut_off
            await asyncio.wait([rest], timeout=INTERRUPT_SECONDS)
        handed_back: list[tuple[UUID, Priority]] = []
        try:
            await within(FORCE_SECONDS, self._hand_back_by_force(handed_back))
        except (SQLAlchemyError, TimeoutError) as error:
            logger.warning("Postgres failed; runs are left to their leases", extra={"fields": {"error": str(error)}})
        return handed_back

    def _is_draining(self) -> bool:
        return self._draining

    async def _all_at_rest(self) -> None:
        while self._executing:
            await asyncio.wait(self._executing)

    async def _hand_back_by_force(self, handed_back: list[tuple[UUID, Priority]]) -> None:
        stuck = list(self._leases.held.values())
        if not stuck:
            return
        logger.warning("runs do not heed their interruption", extra={"fields": {"runs": len(stuck)}})
        async with self._leases.engine.connect() as connection:
            for held in stuck:
                run = held.claim.run
                with suppress(LeaseLost):
                    await leases.requeue(connection, held.claim, actor=self._actor, why="drain")
                    handed_back.append((run.id, run.priority))

    async def _execute(self, run_id: UUID) -> Priority | None:
        if self._draining:
            return Priority.HIGH  # to the front of the queue, where it came from: it was never claimed here
        # failpoint: before_claim
        began = local_now()
        async with self._engine.connect() as connection:
            claim = await leases.claim(
                connection,
                run_id,
                worker=self._worker,
                lease_seconds=self._leases.lease_seconds,
                build=self._build,
            )
        if claim is None:
            return None
        # failpoint: after_claim
        run = claim.run
        with bind(attempt=run.attempt, trace_id=run.id.hex, tenant=run.tenant, request_id=run.request_id):
            return await self._hold(claim, began)

    async def _hold(self, claim: Claim, began: float) -> Priority | None:
        """A run that is ours until it comes to rest. `began`: when it was asked for (`local_now`)."""
        run_id = claim.run.id
        watch = self._observer.claimed(claim.run)
        self._leases.drop(run_id)  # an earlier claim of ours that was taken over meanwhile, by ourselves
        task = asyncio.current_task()
        assert task is not None
        held = self._leases.held[run_id] = Held(claim, task, began + self._leases.lease_seconds)
        try:
            outcome, error = await self._run(held, watch)
        except asyncio.CancelledError:
            if held.interruption is None:
                raise
            task.uncancel()
            if held.interruption is Interruption.LOST:
                raise LeaseLost from None
            outcome, error = HandedBack(), None
        finally:
            if self._leases.held.get(run_id) is held:
                del self._leases.held[run_id]
        # failpoint: before_settle
        await self._settle(claim, outcome, error)
        # failpoint: after_settle
        return claim.run.priority if isinstance(outcome, HandedBack) else None

    async def _run(self, held: Held, watch: RunObserver) -> tuple[Outcome, str | None]:
        """The loop, and what its errors mean: the outcome and, for the caller of the API, a reference to the cause."""
        run = held.claim.run
        try:
            agent = self._agents.get(run.agent)
            if agent is None:
                logger.error("agent is not known to this worker", extra={"fields": {"agent": run.agent}})
                return Stopped(StopReason.INTERNAL_ERROR), f"This worker does not know the agent {run.agent!r}."
            state = await self._load(run, agent)
            # failpoint: after_load
            journal = RunJournal(
                self._engine,
                held,
                lease_seconds=self._leases.lease_seconds,
                actor=self._actor,
                versions={
                    "agent": agent.name,
                    "agent_version": agent.version,
                    "prompt_sha256": agent.prompt_sha256,
                    "prices_sha256": self._prices.digest,
                },
                tools=agent.tools_by_name,
                instructions_sha256=(
                    None if isinstance(agent.instructions, str) else digest(agent.render_instructions(run.input))
                ),
            )
            asker = replace(self._asker, watched=watch.watched)
            within_budget = WithinBudget(asker, self._engine, held, self._asker.random, self._is_draining)
            try:
                async with asyncio.timeout(max(0.0, state.time_left())):
                    outcome = await run_loop(
                        state,
                        journal=journal,
                        asker=within_budget,
                        caller=self._caller.under(held.sure_for, watch.tool_called),
                        draining=self._is_draining,
                    )
            except TimeoutError:
                outcome = stopped_by(StopReason.DEADLINE, state)
        except ModelError as error:
            logger.warning("model error", extra={"fields": {"error": str(error)}})
            return Stopped(StopReason.MODEL_ERROR), "The model gave no usable reply."
        except OverBudget as error:
            return Stopped(StopReason.BUDGET), str(error)
        except (LeaseLost, OperationalError, InterfaceError, PoolTimeout):
            raise
        except Exception:
            # A bug of ours or of the agent's code. The traceback is for the log; the caller gets the run's id.
            logger.exception("run crashed")
            return Stopped(StopReason.INTERNAL_ERROR), f"Internal error; the log has it under run {run.id}."
        return outcome, None

    async def _load(self, run: Run, agent: Agent) -> RunState:
        recorded = []
        asked: dict[int, list[Review]] = {}
        if run.attempt > 1:
            async with self._engine.connect() as connection:
                recorded = list(await steps.steps_of(connection, run.id))
                found = await reviews.of_run(connection, run.id)
            self._observer.reviewed(run, found)
            # By Postgres' clock: their ids have the time of the worker that asked.
            for review in sorted(found, key=lambda review: review.created_at):
                if review.seq is not None:
                    asked.setdefault(review.seq, []).append(review)
        models = models_of(agent, self._model_override)
        return RunState(
            run=run,
            agent=agent,
            models=models,
            prices={model: self._prices[model] for model in models},
            steps=recorded,
            reviews=asked,
            usage=run.usage,
        )

    async def _settle(self, claim: Claim, outcome: Outcome, error: str | None) -> None:
        async with self._engine.connect() as connection:
            match outcome:
                case Answered(output):
                    final = StopReason.FINAL_ANSWER
                    ended = await leases.finish(connection, claim, final, actor=self._actor, output=output)
                    self._observer.ended(ended)
                case Stopped(reason):
                    ended = await leases.finish(connection, claim, reason, actor=self._actor, error=error)
                    self._observer.ended(ended)
                case Suspended(questions):
                    await leases.suspend(
                        connection,
                        claim,
                        questions,
                        actor=self._actor,
                        rules=self._agents[claim.run.agent].review_rules,
                    )
                case HandedBack():
                    await leases.requeue(connection, claim, actor=self._actor, why="drain")
                    return
        await self._signals.publish(RESTED, claim.run.id)
