"""Seals the audit: once a minute, one signature over all chains that have grown. In one worker at a time.

Each round: a checkpoint of the changed heads is made, stored, and kept outside of the database as well. What a
transaction that is still open adds is not there yet, and so a matter of a later round.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.anchor import Anchor, open_anchor
from app.audit.keys import load_private_key
from app.audit.proof import Checkpoint, leaf_hash, sign_checkpoint
from app.config import Settings
from app.db import seals
from app.db.engine import transactional
from app.db.seals import Heads, Stored
from app.domain.errors import AnchorConflict, AnchorUnavailable, ConfigurationError

logger = logging.getLogger(__name__)

SEAL_SECONDS = 60.0
HEADS = 50_000
"""Heads in one checkpoint; where more have changed, the next one follows at once."""
MARKS = 500
"""Heads that are marked in one transaction: a run's worker may wait for it."""
ANCHOR_SECONDS = 20.0
"""How long keeping or reading a checkpoint outside may take."""
LOCK_IDLE_SECONDS = 30.0
"""A sealer that does nothing for so long is frozen, and another one may seal."""
ADVICE = (
    "Nothing is sealed until this is settled. Was an old backup restored, or AUDIT_ANCHOR pointed at another service's"
    " checkpoints? `agent-service audit verify` shows what differs. To go on from what the database has now, keep the"
    " present anchor as evidence and let AUDIT_ANCHOR name a new place."
)

T = TypeVar("T")


def open_sealer(settings: Settings, engine: AsyncEngine) -> "Sealer | None":
    """The sealer of this process; None where there is no key to sign with.

    Raises `ConfigurationError`.
    """
    if settings.audit_signing_key is None:
        logger.info("the audit is not sealed: AUDIT_SIGNING_KEY is not set")
        return None
    try:
        key = load_private_key(settings.audit_signing_key.get_secret_value())
    except ValueError as error:
        raise ConfigurationError(f"AUDIT_SIGNING_KEY is malformed: it {error}") from None
    return Sealer(engine, key, open_anchor(settings.audit_anchor))


class Sealer:
    """One per worker process; an advisory lock picks the one that seals."""

    def __init__(self, engine: AsyncEngine, key: Ed25519PrivateKey, anchor: Anchor) -> None:
        self._engine = engine
        self._transactional = transactional(engine)
        self._key = key
        self._anchor = anchor
        # A thread of its own: one that hangs on a disk or a network keeps nobody else waiting.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="anchor")

    async def keep_sealing(self) -> None:
        """Seal for ever, at first right now; what fails is tried again in the next round."""
        while True:
            try:
                await self.seal(unless_within=SEAL_SECONDS / 2)
            except AnchorConflict as error:
                fields = {"error": str(error), "advice": ADVICE}
                logger.error("the audit is not sealed", extra={"fields": fields})  # noqa: TRY400 - no bug of ours
            except (SQLAlchemyError, AnchorUnavailable) as error:
                logger.warning("sealing failed", extra={"fields": {"error": str(error)}})
            await asyncio.sleep(SEAL_SECONDS)

    async def seal(self, *, unless_within: float = 0) -> None:
        """One round; does nothing while another process is at it, or when one has sealed within so many seconds.

        Raises `AnchorConflict` where the anchor contradicts the database, `AnchorUnavailable` where it does not answer:
        then what was stored is anchored first of all in the next round.
        """
        async with self._transactional.begin() as lock:
            if not await seals.try_lock(lock, idle_seconds=LOCK_IDLE_SECONDS):
                return
            newest = await seals.newest(lock)
            await self._compare(newest)
            for left_behind in await seals.unanchored(lock):
                await self._keep(left_behind)
            if newest and 0 <= newest.seconds_ago < unless_within:
                return
            previous = newest.checkpoint if newest else None
            while heads := await seals.unsealed(lock, limit=HEADS):
                previous = await self._seal(heads, previous)
                if len(heads) < HEADS:
                    break

    async def _seal(self, heads: Heads, previous: Checkpoint | None) -> Checkpoint:
        began = time.perf_counter()
        checkpoint, parameters = await asyncio.to_thread(self._sign, heads, previous)
        async with self._engine.connect() as connection:
            await seals.seal(connection, parameters)
            # failpoint: seal_stored
            for begin in range(0, len(heads), MARKS):
                await seals.mark(connection, checkpoint.number, heads.encoded[begin : begin + MARKS])
        await self._keep(checkpoint)
        ms = round((time.perf_counter() - began) * 1000)
        fields = {"checkpoint": checkpoint.number, "heads": len(heads), "ms": ms}
        logger.info("audit sealed", extra={"fields": fields})
        return checkpoint

    def _sign(self, heads: Heads, previous: Checkpoint | None) -> tuple[Checkpoint, dict[str, object]]:
        leaf_hashes = [leaf_hash(leaf) for leaf in heads.encoded]
        checkpoint = sign_checkpoint(leaf_hashes, previous=previous, at=heads.at, key=self._key)
        return checkpoint, seals.seal_parameters(checkpoint, heads)

    async def _keep(self, checkpoint: Checkpoint) -> None:
        """Outside of the database, and note that it is."""
        if not checkpoint.is_signed_by(self._key.public_key()):
            raise AnchorConflict(
                f"checkpoint {checkpoint.number} in the database is not signed with AUDIT_SIGNING_KEY, and was not kept"
                " outside before"
            )
        # failpoint: seal_before_anchor
        await self._outside(lambda: self._anchor.append(checkpoint))
        # failpoint: seal_after_anchor
        async with self._engine.connect() as connection:
            await seals.note_anchored(connection, checkpoint)

    async def _compare(self, newest: Stored | None) -> None:
        """Does the anchor say that the database is what it was?"""
        number = newest.checkpoint.number if newest else 0
        kept = await self._outside(lambda: list(islice(self._anchor.read(max(number, 1)), 2)))
        if kept and kept[-1].number > number:
            raise AnchorConflict(
                f"the anchor holds checkpoint {kept[-1].number}, and the newest in the database is {number}"
            )
        if newest and kept and kept[0] != newest.checkpoint:
            raise AnchorConflict(f"the anchor holds another checkpoint {number} than the database")
        if newest and newest.is_anchored and not kept:
            logger.warning("the anchor has lost a checkpoint", extra={"fields": {"checkpoint": number}})

    async def _outside(self, call: Callable[[], T]) -> T:
        work = asyncio.get_running_loop().run_in_executor(self._thread, call)
        try:
            async with asyncio.timeout(ANCHOR_SECONDS):
                return await work
        except TimeoutError:
            raise AnchorUnavailable(f"the anchor has not answered within {ANCHOR_SECONDS:g} s") from None
