"""What the verifier reads, wherever it is kept. Each source gives all of it as it was at one moment."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

from .proof import Checkpoint


class Recorded(NamedTuple):
    """An event, with the `text` that was hashed. Hashes are hex; `at` is in UTC, as in that text.

    `salt` and `payload` are None where they were not read; `has_payload` is None where nobody looked.
    """

    seq: int
    at: str
    tenant: str
    kind: str
    payload_sha256: str | None
    previous: str | None
    text: str
    hash: str
    has_payload: bool | None = None
    salt: str | None = None
    payload: str | None = None


class Sealed(NamedTuple):
    """What a checkpoint saw of a run: the hash of the event that was its last."""

    checkpoint: int
    seq: int
    hash: str


class Row(NamedTuple):
    """The run itself."""

    tenant: str
    status: str


class History(NamedTuple):
    """All that is kept of one run. `head`: number and hash of its last event, as the head row has them."""

    run_id: str
    row: Row | None
    head: tuple[int, str] | None
    leaves: Sequence[Sealed]
    events: Sequence[Recorded]


class Seal(NamedTuple):
    """A checkpoint under its number, with the hashes of its leaves in their order. None: there are only leaves."""

    number: int
    checkpoint: Checkpoint | None
    is_anchored: bool
    leaves: Sequence[bytes]


class Source(Protocol):
    """What is verified: all of it as it was at one moment."""

    @property
    def at(self) -> datetime:
        """That moment."""

    @property
    def has_all_checkpoints(self) -> bool:
        """Otherwise those are missing that have nothing to do with its runs."""

    @property
    def problems(self) -> Sequence[str]:
        """What is wrong with the source itself; known once all of it was read."""

    def seals(self) -> Iterator[Seal]:
        """In the order of their numbers; read before the runs."""

    def histories(self) -> Iterator[History]:
        """In the order of the runs' ids."""
