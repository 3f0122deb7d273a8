"""One round of the sealer, in a process of its own: workers seal once a minute, and no test waits for that."""

import asyncio

from app.config import load_settings
from app.db.engine import make_engine
from worker.sealer import open_sealer


async def seal() -> None:
    settings = load_settings()
    engine = make_engine(settings.database_url.get_secret_value(), pool_size=3, application_name="sealer")
    sealer = open_sealer(settings, engine)
    assert sealer is not None
    await sealer.seal()
    await engine.dispose()


asyncio.run(seal())
