"""Workers and Postgres die while runs end: every transition is told of at least once, and none that did not happen."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random, SystemRandom

from app.devstack.access import make_key
from app.domain.principal import Scope
from tests.api.conftest import client_of
from tests.faults.conftest import Hold
from tests.faults.inflict import FAULTS
from tests.faults.load import Load
from tests.faults.rig import TENANT, Rig
from tests.webhook_receiver import Answer, Receiver, a_receiver, verify

SEED = int(os.environ.get("FAULT_SEED") or SystemRandom().randrange(2**32))
KILLING = [fault for fault in FAULTS if fault.kind in ("worker", "Postgres")]
TOLD_OF = {
    "run.suspended": "run.waiting",
    "run.succeeded": "run.succeeded",
    "run.failed": "run.failed",
    "run.cancelled": "run.cancelled",
}
"""The audit's word, and the webhook's."""


@contextmanager
def a_webhook(rig: Rig, receiver: Receiver) -> Iterator[str]:
    """Its secret."""
    with client_of(rig.api, make_key(rig.database_url, tenant=TENANT, name="admin", scopes=[Scope.ADMIN])) as admin:
        response = admin.post("/v1/webhooks", json={"url": receiver.url()})
        assert response.status_code == 201, response.text
        try:
            yield str(response.json()["secret"])
        finally:
            assert admin.delete(response.headers["Location"]).status_code == 204


def until_nothing_is_pending(rig: Rig, runs: Sequence[str]) -> None:
    """As if half a minute had passed: what a worker was sending when it died, another one may send now."""
    of_runs = "WHERE run_id = ANY(%s::uuid[]) AND status = 'pending'"
    rig.rows(f"UPDATE webhook_deliveries SET next_attempt_at = now() {of_runs} RETURNING id", [list(runs)])
    pending = f"SELECT * FROM webhook_deliveries {of_runs} LIMIT 3"
    rig.until(lambda: not rig.rows(pending, [list(runs)]), seconds=30)


def test_every_transition_is_told_of_whatever_is_killed(rig: Rig, holds: Hold) -> None:
    random = Random(SEED)
    schedule = [random.choice(KILLING) for _ in range(5)]
    print(f"FAULT_SEED={SEED}\n{', then '.join(fault.name for fault in schedule)}")
    with a_receiver(rig.webhook_port) as receiver, a_webhook(rig, receiver) as secret:
        receiver.answers = lambda message: Answer(after=random.uniform(0, 1))  # so that deaths come in the middle, too
        before = rig.now()
        load = Load(rig, open_runs=10)
        with load.coming():
            for fault in schedule:
                time.sleep(random.uniform(0, 1))
                fault.inflict(rig, random)
        rig.heal()
        runs = sorted({*load.accepted, *rig.runs_since(before)})
        rig.settle(runs, seconds=40)
        until_nothing_is_pending(rig, runs)

        happened = Counter(
            (str(event["run_id"]), TOLD_OF[event["kind"]])
            for event in rig.rows(
                "SELECT run_id, kind FROM audit_events WHERE run_id = ANY(%s::uuid[]) AND kind = ANY(%s)",
                [runs, list(TOLD_OF)],
            )
        )
        messages = list(receiver.messages)
        told = {message.id: (message.run_id, message.content["type"]) for message in messages}
        assert Counter(told.values()) == happened
        for message in messages:
            verify(secret, message.headers, message.body)
    print(f"{len(runs)} runs, {len(told)} messages, {len(messages)} attempts")
    holds("random kills, and webhooks", f"seed {SEED}", runs)
