"""Who calls: an API key, its tenant and its scopes."""

from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """What a key may do. `admin` includes all that are about the key's tenant: all but `scaling:read`."""

    RUNS_READ = "runs:read"
    RUNS_WRITE = "runs:write"
    REVIEWS_READ = "reviews:read"
    REVIEWS_DECIDE = "reviews:decide"
    REVIEWS_ESCALATED = "reviews:escalated"
    """Decide what nobody of the first queue decided in time."""
    AUDIT_READ = "audit:read"
    SCALING_READ = "scaling:read"
    """How much the whole service has to do: counts over all tenants, and nobody's data. For autoscalers."""
    ADMIN = "admin"


_OF_BACKENDS = frozenset({Scope.RUNS_READ, Scope.RUNS_WRITE})
_OF_NO_TENANT = frozenset({Scope.SCALING_READ})


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """How much a key may ask for: `requests_per_s` on average, `burst` at once after a pause, and `max_in_flight` runs
    that are queued or running."""

    requests_per_s: float = 100.0
    burst: int = 200
    max_in_flight: int = 1_000


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller whose key was valid at the time of the request.

    `holder`: whose key it is. A key that replaces another one, when it is rotated, is the same holder's.
    """

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    holder: str
    limits: KeyLimits = KeyLimits()

    def has(self, scope: Scope) -> bool:
        return scope in self.scopes or (Scope.ADMIN in self.scopes and scope not in _OF_NO_TENANT)

    @property
    def is_operator(self) -> bool:
        """A person's key: it may do more than a backend that submits runs and reads their results."""
        return not self.scopes <= _OF_BACKENDS

    @property
    def actor(self) -> str:
        """How the audit names this caller."""
        return f"key:{self.key_id}"
