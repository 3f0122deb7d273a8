"""Who calls: an API key, its tenant and its scopes."""

from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """What a key may do. `admin` includes all of them, within the key's tenant."""

    RUNS_READ = "runs:read"
    RUNS_WRITE = "runs:write"
    REVIEWS_READ = "reviews:read"
    REVIEWS_DECIDE = "reviews:decide"
    REVIEWS_ESCALATED = "reviews:escalated"
    """Decide what nobody of the first queue decided in time."""
    AUDIT_READ = "audit:read"
    ADMIN = "admin"


_OF_BACKENDS = frozenset({Scope.RUNS_READ, Scope.RUNS_WRITE})


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller whose key was valid at the time of the request."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]

    def has(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    @property
    def is_operator(self) -> bool:
        """A person's key: it may do more than a backend that submits runs and reads their results."""
        return not self.scopes <= _OF_BACKENDS

    @property
    def actor(self) -> str:
        """How the audit names this caller."""
        return f"key:{self.key_id}"
