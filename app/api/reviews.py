"""Reviews: the inbox of people."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query
from pydantic import Field

from app.api import schemas
from app.api.body import JsonBody
from app.api.deps import Reviewer, ReviewReader, ServicesDep
from app.api.openapi import json_body, problems
from app.api.pagination import PageById, cut, id_cursor
from app.db import reviews
from app.domain.errors import NotFound
from app.domain.review import Decision, ReviewStatus
from app.intake import Verdict

router = APIRouter(tags=["reviews"])

ReviewId = Annotated[UUID, Path(description="The review's id.")]


class ReviewQuery(PageById):
    status: ReviewStatus | None = Field(None, description="Only reviews in this state.")


@router.get("/v1/reviews", operation_id="listReviews", summary="List reviews, newest first", responses=problems(422))
async def list_reviews(
    caller: ReviewReader, services: ServicesDep, query: Annotated[ReviewQuery, Query()]
) -> schemas.ReviewList:
    async with services.engine.connect() as connection:
        found = await reviews.list_newest(
            connection, caller.tenant, status=query.status, before=query.cursor, limit=query.limit + 1
        )
    page, next_cursor = cut(found, query.limit, lambda review: id_cursor(review.id))
    return schemas.ReviewList(data=[schemas.Review.of(review) for review in page], next_cursor=next_cursor)


@router.get("/v1/reviews/{review_id}", operation_id="getReview", summary="Read a review", responses=problems(404))
async def get_review(caller: ReviewReader, services: ServicesDep, review_id: ReviewId) -> schemas.Review:
    async with services.engine.connect() as connection:
        review = await reviews.get(connection, review_id, caller.tenant)
    if review is None:
        raise NotFound("no such review")
    return schemas.Review.of(review)


@router.post(
    "/v1/reviews/{review_id}/decision",
    operation_id="decideReview",
    summary="Decide a review, once",
    responses=problems(404, 409, 413, 415, 422),
    openapi_extra=json_body(schemas.DecideReview),
)
async def decide_review(
    caller: Reviewer,
    services: ServicesDep,
    review_id: ReviewId,
    body: Annotated[schemas.DecideReview, Depends(JsonBody(schemas.DecideReview))],
) -> schemas.Review:
    verdict = Verdict(
        decision=Decision(body.decision),
        args_hash=body.args_hash,
        reason=body.reason,
        response=body.response,
        end_run=body.end_run,
    )
    return schemas.Review.of(await services.intake.decide_review(caller, review_id, verdict))
