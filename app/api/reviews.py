"""Reviews: the inbox of people."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import Field

from app.api.access import note_read
from app.api.body import JsonBody
from app.api.consequences import consequences
from app.api.deps import Reviewer, ReviewReader, ServicesDep
from app.api.openapi import json_body, problems
from app.api.pagination import PageById, cut, id_cursor
from app.api.review_schemas import DecideReview, Review, ReviewDetail, ReviewList
from app.db import reviews, runs, steps
from app.decisions import Verdict
from app.domain.errors import NotFound
from app.domain.review import Decision, ReviewKind, ReviewQueue, ReviewStatus
from app.logging import about_run

MAX_STEPS = 100
"""Of a run that is shown with its review: the newest."""
_CENTURY_SECONDS = 100 * 365 * 86_400

router = APIRouter(tags=["reviews"])

ReviewId = Annotated[UUID, Path(description="The review's id.")]


class ReviewQuery(PageById):
    status: ReviewStatus | None = Field(None, description="Only reviews in this state.")
    agent: str | None = Field(None, pattern="^[a-z][a-z0-9_-]{0,63}$", description="Only reviews of this agent's runs.")
    kind: ReviewKind | None = Field(None, description="Only reviews of this kind.")
    queue: ReviewQueue | None = Field(None, description="Only reviews of this queue.")
    older_than: float | None = Field(None, ge=0, le=_CENTURY_SECONDS, description="Only those asked before: seconds.")
    newer_than: float | None = Field(None, ge=0, le=_CENTURY_SECONDS, description="Only those asked since: seconds.")


@router.get("/v1/reviews", operation_id="listReviews", summary="List reviews, newest first", responses=problems(422))
async def list_reviews(
    request: Request, caller: ReviewReader, services: ServicesDep, query: Annotated[ReviewQuery, Query()]
) -> ReviewList:
    where = reviews.ReviewFilter(**query.model_dump(exclude={"limit", "cursor"}), before=query.cursor)
    async with services.engine.connect() as connection:
        found = await reviews.list_newest(connection, caller.tenant, where, limit=query.limit + 1)
    page, next_cursor = cut(found, query.limit, lambda review: id_cursor(review.id))
    await note_read(request, services, caller, [review.run_id for review in page], "reviews")
    return ReviewList(data=[Review.of(review) for review in page], next_cursor=next_cursor)


@router.get(
    "/v1/reviews/{review_id}",
    operation_id="getReview",
    summary="Read a review, and what each decision will do",
    responses=problems(404),
)
async def get_review(
    request: Request, caller: ReviewReader, services: ServicesDep, review_id: ReviewId
) -> ReviewDetail:
    async with services.engine.connect() as connection:
        review = await reviews.get(connection, review_id, caller.tenant)
        if review is None:
            raise NotFound("no such review")
        about_run(review.run_id)
        run = await runs.get(connection, review.run_id, caller.tenant)
        assert run is not None
        recorded = await steps.newest_of(connection, run.id, limit=MAX_STEPS)
        others = await reviews.count_open(connection, run.id, besides=review.id)
        worker = await reviews.worker_that_began(connection, review) if review.kind is ReviewKind.IN_DOUBT else None
    await note_read(request, services, caller, [run.id], "review")
    agent = services.agents.get(review.agent)
    tool = agent.tools_by_name.get(review.tool or "") if agent else None
    effects = consequences(review, run, agent, others=others, worker=worker)
    return ReviewDetail.model_validate(
        {
            **Review.of(review).model_dump(),
            "tool_description": tool.description if tool else None,
            "run_input": run.input,
            "steps": recorded,
            "decisions": [{"decision": decision, "effect": effect} for decision, effect in effects],
            "worker": worker,
        },
        from_attributes=True,
    )


@router.post(
    "/v1/reviews/{review_id}/decision",
    operation_id="decideReview",
    summary="Decide a review, once",
    description="What was escalated needs the scope `reviews:escalated` instead.",
    responses=problems(404, 409, 413, 415, 422),
    openapi_extra=json_body(DecideReview),
)
async def decide_review(
    caller: Reviewer,
    services: ServicesDep,
    review_id: ReviewId,
    body: Annotated[DecideReview, Depends(JsonBody(DecideReview))],
) -> Review:
    verdict = Verdict(**{**body.model_dump(), "decision": Decision(body.decision)})
    return Review.of(await services.decisions.decide(caller, review_id, verdict))
