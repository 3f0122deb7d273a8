"""Pages: `limit`, and an opaque `cursor` that says after which entry the next page begins."""

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

Entry = TypeVar("Entry")


def _decode(cursor: object, size: int) -> bytes:
    try:
        decoded = base64.b64decode(f"{cursor}==", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if len(decoded) != size:
        raise ValueError("is not a cursor of this list")
    return decoded


def _encode(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


def id_cursor(run_id: UUID) -> str:
    return _encode(run_id.bytes)


def seq_cursor(seq: int) -> str:
    return _encode(seq.to_bytes(4, "big"))


IdCursor = Annotated[
    UUID,
    BeforeValidator(lambda cursor: UUID(bytes=_decode(cursor, 16))),
    WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9_-]{22}$"}),
]
"""Where a list by id goes on."""
SeqCursor = Annotated[
    int,
    BeforeValidator(lambda cursor: int.from_bytes(_decode(cursor, 4), "big")),
    WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9_-]{6}$"}),
]
"""Where a run's steps or events go on."""

_CURSOR = "The `next_cursor` of the page before."


class Page(BaseModel):
    """Query parameters of every list. An unknown parameter is refused: a misspelt filter would list everything."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(50, ge=1, le=100, description="Entries on a page, at most.")


class PageById(Page):
    cursor: IdCursor | None = Field(None, description=_CURSOR)


class PageBySeq(Page):
    cursor: SeqCursor | None = Field(None, description=_CURSOR)


def cut(entries: Sequence[Entry], limit: int, cursor_of: Callable[[Entry], str]) -> tuple[list[Entry], str | None]:
    """A page out of up to `limit + 1` entries, and the cursor of the next one where there is one."""
    page = list(entries[:limit])
    return page, cursor_of(page[-1]) if len(entries) > limit else None
