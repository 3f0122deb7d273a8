"""Who is given personal data, and that it is written down first.

A backend's key reads what it has submitted. Any other key is a person's, and whatever that is given of a run is in the
run's audit before it is sent: where it cannot be recorded, nothing is sent.
"""

from collections.abc import Iterable
from uuid import UUID

from starlette.requests import Request

from app.api.deps import Services
from app.db import audit
from app.domain.audit import AuditEntry, AuditKind
from app.domain.principal import Principal


async def note_read(
    request: Request, services: Services, caller: Principal, run_ids: Iterable[UUID], what: str
) -> None:
    """Record that an operator is about to be given `what` of these runs. A decision is its own record."""
    read = list(run_ids)
    if not caller.is_operator or not read:
        return
    entry = AuditEntry(AuditKind.RUN_READ, {"what": what, "request_id": request.state.request_id})
    async with services.engine.connect() as connection:
        await audit.append(connection, read, entry, actor=caller.actor)
