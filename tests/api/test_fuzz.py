"""Whatever is sent, the API does what its document says: schemathesis with all of its checks, the short form.

`FUZZ_SEED=…` asks something else; `make soak` asks for twenty minutes.
"""

import os
from pathlib import Path

from app.webhook_signature import new_signing_key
from tests.api.conftest import StartApi
from tests.fuzz import SILENT, errors_in, fuzz
from tests.stack import Stack

SEED = int(os.environ.get("FUZZ_SEED") or 2026)
EXAMPLES = 3


def test_the_api_does_what_its_document_says_whatever_is_sent(
    servers: Stack, start_api: StartApi, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    own = {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
    agents = {"AGENTS": "app.agents,tests.fuzz.agents"}
    worker = servers.another_worker("fuzz-worker", **own, **agents, **SILENT)
    api = start_api(**agents, WEBHOOK_SIGNING_KEY=new_signing_key())
    worker.start()
    try:
        found = fuzz(api.address, database_url, tmp_path, seed=SEED, examples=EXAMPLES)
    finally:
        worker.stop()
    print(f"FUZZ_SEED={SEED}: {found.requests} requests\n{found.text}")
    assert found.is_clean, found.text
    assert found.requests > 20 * found.operations
    assert errors_in(api.log) == []
