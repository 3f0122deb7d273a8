"""The shapes of reviews and decisions."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from app.api.schemas import Answer, Step
from app.domain.agent import OnExpiry
from app.domain.review import Decision, ReviewKind, ReviewQueue, ReviewStatus
from app.domain.review import Review as DomainReview
from app.domain.run import StopReason

_NEEDED = {"edit": "arguments", "respond": "response"}
"""What goes with a decision, and only with it."""


def _for_each_decision(schema: dict[str, Any]) -> None:
    """Says, for each decision, which fields go with it."""
    properties, required = schema.pop("properties"), schema.pop("required")
    shape = {key: schema.pop(key) for key in ("type", "additionalProperties")}
    schema["oneOf"] = []
    for decision in properties["decision"]["enum"]:
        fields = {**properties, "decision": {"const": decision, "description": properties["decision"]["description"]}}
        for owner, name in _NEEDED.items():
            kinds = properties[name]["anyOf"]
            fields[name] = {
                **properties[name],
                "anyOf": [kind for kind in kinds if _is_null(kind) == (owner != decision)],
            }
        if decision != "reject":
            fields["end_run"] = {**properties["end_run"], "const": False}
        needed = [*required, _NEEDED[decision]] if decision in _NEEDED else required
        schema["oneOf"].append({"title": f"To {decision}", **shape, "properties": fields, "required": needed})


def _is_null(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "null"


class DecideReview(BaseModel):
    """A person's decision. GET /v1/reviews/{review_id} says which are possible, and what each will do."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=_for_each_decision)

    decision: Literal["approve", "edit", "reject", "respond"] = Field(
        description="Do what is proposed; do it with other `arguments`; do not do it; or answer with `response`."
    )
    args_hash: str = Field(pattern="^[0-9a-f]{64}$", description="The review's, as you read it: pins what you saw.")
    reason: str | None = Field(None, max_length=2_000, description="Told to the model with a rejection.")
    arguments: dict[str, JsonValue] | None = Field(
        None, description="With `edit`: all arguments of the call, or the limit's new value by its name."
    )
    response: Annotated[str, StringConstraints(max_length=20_000, pattern=r"\S")] | None = Field(
        None, description="With `respond`: the answer, the result of the call in doubt, or the run's output."
    )
    end_run: bool = Field(False, description="With `reject`: end the run instead of telling the model.")


class Review(Answer):
    """A question to a person: may this be done, did it happen, what is the answer, may the run go on?"""

    id: UUID
    run_id: UUID
    agent: str
    kind: ReviewKind
    seq: int | None = Field(description="The step that this call is, or would be; null: it is about the whole run.")
    tool: str | None
    arguments: JsonValue = Field(description="Of the call; of a limit, its proposed new value by its name.")
    args_hash: str = Field(description="SHA-256 of what is proposed; send it back with the decision.")
    why: str = Field(description="What stopped the run.")
    stop_reason: StopReason | None = Field(description="How the run ends if its limit is not raised.")
    queue: ReviewQueue = Field(description="`second`: nobody of the first queue decided in time.")
    barred: list[str] = Field(description="Who may not decide it, because the agent demands four eyes: `key:…`.")
    status: ReviewStatus
    decision: Decision | None
    edited: JsonValue = Field(description="The arguments that were put in place of those proposed.")
    reason: str | None
    response: str | None
    decided_by: str | None
    created_at: datetime
    decided_at: datetime | None
    expires_at: datetime
    on_expiry: OnExpiry = Field(description="What happens then. It is never approved.")

    @classmethod
    def of(cls, review: DomainReview) -> Self:
        return cls.model_validate(review)


class ReviewList(Answer):
    """Newest first."""

    data: list[Review]
    next_cursor: str | None


class PossibleDecision(Answer):
    """A decision that can be made about this review, and what it will do."""

    decision: Decision
    effect: str


class ReviewDetail(Review):
    """A review and what a person needs to decide it."""

    tool_description: str | None = Field(description="What the model was told; null: this release does not know it.")
    run_input: JsonValue
    steps: list[Step] = Field(description="What the run did so far: the newest 100, oldest first.")
    decisions: list[PossibleDecision] = Field(description="Empty once nothing is left to decide.")
    worker: str | None = Field(description="Who began a call that is in doubt. Only when it is gone is that settled.")
