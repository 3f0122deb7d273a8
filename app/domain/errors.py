"""Every error the service raises on purpose.

AgentServiceError
├── ConfigurationError      the process cannot start like this; the message is one line that names the variable
├── RequestError            a request was refused; carries its HTTP status and a stable problem type
│   ├── NotFound                404
│   ├── Unauthorized            401
│   ├── MissingScope            403
│   ├── FourEyes                403
│   ├── Conflict                409
│   │   ├── RunEnded
│   │   ├── ReviewDecided
│   │   ├── ReviewExpired
│   │   ├── ArgumentsChanged
│   │   ├── WebhooksOff
│   │   ├── TooManyWebhooks
│   │   └── WebhookDisabled
│   ├── InvalidRequest          422
│   │   ├── UnknownAgent
│   │   ├── LimitRaised
│   │   ├── UnpricedModel
│   │   └── IdempotencyMismatch
│   ├── TooManyRequests         429; says when to come back
│   │   ├── RateLimited
│   │   ├── TooManyRuns
│   │   └── BudgetSpent
│   ├── Unavailable             503
│   └── what only HTTP knows: 405, 413, 415, 500 in `app.api.errors`
├── QueueUnavailable        Redis did not take the job; Postgres has the run, a sweeper enqueues it later
├── AnchorUnavailable       where checkpoints are kept did not take or give one; tried again later
├── AnchorConflict          what is kept there contradicts the database: nothing may be sealed on top of that
├── ToolError               raised by a tool: it did not work, and the model is told why
│   └── EgressRefused           an address that may not be asked, or an answer that may not be read
├── OverBudget              what the next model call may cost does not fit into the tenant's budget
├── ModelError
│   ├── ModelUnavailable        transient: rate limit, 5xx, timeout, broken connection or reply
│   └── ModelRefused            permanent: the provider will not answer this request
└── LeaseLost               somebody else owns the run now, or it has ended: stop quietly
"""

import math
from typing import ClassVar

REALM = "agent-service"
"""What our API keys are good for, as HTTP names it."""


class AgentServiceError(Exception):
    """Base of every error raised on purpose."""


class ConfigurationError(AgentServiceError):
    """The process cannot start; the message is one line and names the variable, never a secret."""


class FieldError:
    """One wrong place in a request: a JSON pointer (`#/limits/max_steps`) and what is wrong there."""

    __slots__ = ("detail", "pointer")

    def __init__(self, pointer: str, detail: str) -> None:
        self.pointer = pointer
        self.detail = detail


class RequestError(AgentServiceError):
    """A request was refused. One handler renders all of these as problem+json.

    The message goes to the caller: it never holds a secret or an internal detail.
    """

    status: ClassVar[int] = 400
    problem: ClassVar[str] = "bad-request"
    title: ClassVar[str] = "Bad request"

    def __init__(
        self, detail: str, *, errors: tuple[FieldError, ...] = (), headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        self.headers = headers or {}


class NotFound(RequestError):
    """Missing, or another tenant's: the caller cannot tell which."""

    status = 404
    problem = "not-found"
    title = "Not found"


class Unauthorized(RequestError):
    status = 401
    problem = "unauthorized"
    title = "A valid API key is needed"


class MissingScope(RequestError):
    status = 403
    problem = "missing-scope"
    title = "The API key may not do this"

    def __init__(self, scope: str, detail: str) -> None:
        super().__init__(
            detail, headers={"WWW-Authenticate": f'Bearer realm="{REALM}", error="insufficient_scope", scope="{scope}"'}
        )


class FourEyes(RequestError):
    """The caller has a part in what is to be decided, and the agent wants another person to look at it."""

    status = 403
    problem = "four-eyes"
    title = "Somebody else has to decide this"


class Conflict(RequestError):
    """The thing is no longer in a state in which this can be done."""

    status = 409
    problem = "conflict"
    title = "Not possible any more"


class RunEnded(Conflict):
    problem = "run-ended"
    title = "The run has ended"


class ReviewDecided(Conflict):
    problem = "review-decided"
    title = "Somebody has decided already"


class ReviewExpired(Conflict):
    problem = "review-expired"
    title = "The time to decide is over"


class ArgumentsChanged(Conflict):
    problem = "arguments-changed"
    title = "These are not the arguments that were decided on"


class WebhooksOff(Conflict):
    """This deployment has nothing to sign messages with."""

    problem = "webhooks-off"
    title = "There are no webhooks here"


class TooManyWebhooks(Conflict):
    problem = "too-many-webhooks"
    title = "The tenant has as many webhooks as it may have"


class WebhookDisabled(Conflict):
    problem = "webhook-disabled"
    title = "The webhook is disabled"


class InvalidRequest(RequestError):
    status = 422
    problem = "invalid-request"
    title = "The request is not valid"


class UnknownAgent(InvalidRequest):
    problem = "unknown-agent"
    title = "No such agent"


class LimitRaised(InvalidRequest):
    problem = "limit-raised"
    title = "A limit may be lowered, never raised"


class UnpricedModel(InvalidRequest):
    problem = "unpriced-model"
    title = "The agent's model has no price"


class IdempotencyMismatch(InvalidRequest):
    problem = "idempotency-mismatch"
    title = "The idempotency key belongs to another request"


class TooManyRequests(RequestError):
    """More than the key, or its tenant, may have. `retry_after`: seconds until it is worth another try."""

    status = 429
    problem = "too-many-requests"
    title = "Too much"

    def __init__(self, detail: str, *, retry_after: float) -> None:
        super().__init__(detail, headers={"Retry-After": str(max(1, math.ceil(retry_after)))})


class RateLimited(TooManyRequests):
    problem = "rate-limited"
    title = "Too many requests"


class TooManyRuns(TooManyRequests):
    problem = "too-many-runs"
    title = "Too many runs in flight"


class BudgetSpent(TooManyRequests):
    problem = "budget-spent"
    title = "The tenant's budget for today is spent"


class Unavailable(RequestError):
    status = 503
    problem = "unavailable"
    title = "Temporarily unavailable"


class QueueUnavailable(AgentServiceError):
    """Redis did not take the job. Not an error for the caller: Postgres has the run."""


class AnchorUnavailable(AgentServiceError):
    """The file or object store that keeps the audit's checkpoints did not answer, or refused."""


class AnchorConflict(AgentServiceError):
    """What is kept outside of the database is newer than what is in it, or something else. A person has to look."""


class ToolError(AgentServiceError):
    """Raised by a tool when it did not work and had no effect; the message goes to the model."""


class EgressRefused(ToolError):
    """An outgoing request that the service does not make, or an answer that it does not read.

    The message goes to the model: it tells nothing of the network that the service is in.
    """


class OverBudget(AgentServiceError):
    """What the next model call may cost does not fit into what is left of the tenant's budget for the day."""


class ModelError(AgentServiceError):
    """No reply from the model. The message is for logs: it may quote the provider."""


class ModelUnavailable(ModelError):
    """Transient: worth another try.

    `retry_after`: seconds the provider asked us to wait, where it said so.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelRefused(ModelError):
    """Permanent: the same request would be refused again."""


class LeaseLost(AgentServiceError):
    """The run is not ours any more: its lease was taken over, or it was cancelled. Nothing may be written."""
