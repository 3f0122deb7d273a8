"""Outgoing HTTP of tools and webhooks."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from app.domain.errors import EgressRefused
from app.domain.tool import HttpReply


class Egress:
    """One for the process. `trusted`: origins that may be reached although they are private or not https."""

    def __init__(self, trusted: Sequence[str]) -> None:
        self._trusted = frozenset(trusted)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    async def get(
        self,
        url: str,
        *,
        allow: Sequence[str],
        headers: Mapping[str, str] | None = None,
        max_bytes: int = 1_000_000,
        timeout_s: float = 20.0,
    ) -> HttpReply:
        raise EgressRefused(url)
