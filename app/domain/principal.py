"""Who calls: an API key, its tenant and its scopes."""

from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """What a key may do. `admin` includes all of them, within the key's tenant."""

    RUNS_READ = "runs:read"
    RUNS_WRITE = "runs:write"
    REVIEWS_READ = "reviews:read"
    REVIEWS_DECIDE = "reviews:decide"
    AUDIT_READ = "audit:read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller whose key was valid at the time of the request."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]

    def has(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    @property
    def actor(self) -> str:
        """How the audit names this caller."""
        return f"key:{self.key_id}"
