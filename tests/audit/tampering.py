"""Attempts to change the audit, by somebody who is a superuser of the database and has put the triggers out of action.

Each says which checks see it. The table in docs/audit.md is this list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

from app.audit.keys import load_private_key, new_private_key_pem
from app.audit.proof import make_checkpoint
from app.audit.report import Check
from tests.audit.evidence import Evidence

EDIT = "UPDATE audit_events SET actor = 'worker:nobody' WHERE run_id = %s AND seq = 3"
MOVE = "UPDATE audit_events SET seq = %s WHERE run_id = %s AND seq = %s"
EVERYTHING_OF_A_RUN = ("audit_events", "audit_payloads", "audit_heads", "steps")


@dataclass(frozen=True, slots=True)
class Attempt:
    """`seen`: by exactly these checks."""

    what: str
    do: Callable[[Evidence], None]
    seen: tuple[Check, ...]


def edit_an_event(evidence: Evidence) -> None:
    _execute(evidence, EDIT, evidence.runs["succeeded"])


def delete_an_event(evidence: Evidence) -> None:
    _execute(evidence, "DELETE FROM audit_events WHERE run_id = %s AND seq = 3", evidence.runs["succeeded"])


def reorder_two_events(evidence: Evidence) -> None:
    run = evidence.runs["not sealed"]
    with evidence.connect() as connection:
        for before, after in ((3, 1000), (4, 3), (1000, 4)):
            for table in ("audit_events", "audit_payloads"):
                connection.execute(MOVE.replace("audit_events", table), [after, run, before])


def insert_an_event(evidence: Evidence) -> None:
    """With room made for it, and a head that counts it."""
    run = evidence.runs["succeeded"]
    with evidence.connect() as connection:
        for table in ("audit_events", "audit_payloads"):
            connection.execute(f"UPDATE {table} SET seq = -seq WHERE run_id = %s AND seq > 3", [run])
            connection.execute(f"UPDATE {table} SET seq = 1 - seq WHERE run_id = %s AND seq < 0", [run])
        connection.execute(
            """
            INSERT INTO audit_events (run_id, seq, tenant, at, actor, kind, data, hash)
            SELECT run_id, 4, tenant, at, 'key:nobody', 'run.read', '{}', sha256('made up')
            FROM audit_events WHERE run_id = %s AND seq = 3
            """,
            [run],
        )
        connection.execute(
            "UPDATE audit_heads SET (seq, hash) = (SELECT seq, hash FROM audit_events WHERE run_id = %s"
            " ORDER BY seq DESC LIMIT 1) WHERE run_id = %s",
            [run, run],
        )


def truncate_the_tail(evidence: Evidence) -> None:
    run = evidence.runs["succeeded"]
    _execute(evidence, "DELETE FROM audit_events WHERE run_id = %s AND seq > 4", run)
    _execute(evidence, "DELETE FROM audit_payloads WHERE run_id = %s AND seq > 4", run)


def truncate_the_tail_and_the_head(evidence: Evidence) -> None:
    truncate_the_tail(evidence)
    evidence.rechain("succeeded")


def rewrite_a_head(evidence: Evidence) -> None:
    _execute(evidence, "UPDATE audit_heads SET hash = sha256('x') WHERE run_id = %s", evidence.runs["succeeded"])


def rewrite_a_chain(evidence: Evidence) -> None:
    edit_an_event(evidence)
    evidence.rechain("succeeded")


def rewrite_a_chain_and_its_leaves(evidence: Evidence) -> None:
    rewrite_a_chain(evidence)
    evidence.rewrite_leaves("succeeded")


def rewrite_up_to_the_checkpoints(evidence: Evidence) -> None:
    rewrite_a_chain_and_its_leaves(evidence)
    evidence.sign_again(load_private_key(new_private_key_pem()))


def rewrite_with_the_signing_key(evidence: Evidence) -> None:
    rewrite_a_chain_and_its_leaves(evidence)
    evidence.sign_again(evidence.key)


def rewrite_with_the_signing_key_and_the_anchor(evidence: Evidence) -> None:
    rewrite_a_chain_and_its_leaves(evidence)
    evidence.anchor.write_text("".join(checkpoint.line for checkpoint in evidence.sign_again(evidence.key)))


def replace_an_older_checkpoint(evidence: Evidence) -> None:
    """With the real key, and in the anchor as well; the one after it stays."""
    kept = evidence.anchor.read_text().splitlines(keepends=True)[1]
    with evidence.connect() as connection:
        stored = connection.execute("SELECT body, signature FROM audit_checkpoints WHERE number = 2").fetchone()
        rewrite_a_chain_and_its_leaves(evidence)
        older = evidence.sign_again(evidence.key)[0]
        connection.execute("UPDATE audit_checkpoints SET (body, signature) = (%s, %s) WHERE number = 2", stored)
    evidence.anchor.write_text(older.line + kept)


def edit_a_leaf(evidence: Evidence) -> None:
    _execute(evidence, "UPDATE audit_leaves SET hash = sha256('x') WHERE run_id = %s", evidence.runs["failed"])


def forge_a_checkpoint(evidence: Evidence) -> None:
    """The next one, over the head that no checkpoint has seen, kept outside too."""
    evidence.seal(load_private_key(new_private_key_pem()))


def delete_a_checkpoint(evidence: Evidence) -> None:
    _execute(evidence, "DELETE FROM audit_leaves WHERE checkpoint = %s", 1)
    _execute(evidence, "DELETE FROM audit_checkpoints WHERE number = %s", 1)


def delete_the_newest_checkpoint(evidence: Evidence) -> None:
    _execute(evidence, "DELETE FROM audit_leaves WHERE checkpoint = %s", 2)
    _execute(evidence, "DELETE FROM audit_checkpoints WHERE number = %s", 2)


def cut_database_and_anchor_back(evidence: Evidence) -> None:
    delete_the_newest_checkpoint(evidence)
    take_a_checkpoint_from_the_anchor(evidence)


def anchor_another_beside(evidence: Evidence) -> None:
    other = make_checkpoint([], previous=None, at=datetime.now(UTC), key=evidence.key)
    evidence.anchor.write_text(evidence.anchor.read_text() + other.line)


def take_a_checkpoint_from_the_anchor(evidence: Evidence) -> None:
    evidence.anchor.write_text(evidence.anchor.read_text().splitlines(keepends=True)[0])


def delete_a_run(evidence: Evidence) -> None:
    run = evidence.runs["succeeded"]
    for table in EVERYTHING_OF_A_RUN:
        _execute(evidence, f"DELETE FROM {table} WHERE run_id = %s", run)
    _execute(evidence, "DELETE FROM runs WHERE id = %s", run)


def delete_a_runs_row(evidence: Evidence) -> None:
    _execute(evidence, "DELETE FROM runs WHERE id = %s", evidence.runs["succeeded"])


def swap_two_runs(evidence: Evidence) -> None:
    """All that the audit has of two runs with as many events."""
    one, other, nobody = evidence.runs["succeeded"], evidence.runs["alike"], uuid4()
    for table in ("audit_events", "audit_payloads"):
        for before, after in ((one, nobody), (other, one), (nobody, other)):
            _execute(evidence, f"UPDATE {table} SET run_id = %s WHERE run_id = %s", after, before)


def move_to_another_tenant(evidence: Evidence) -> None:
    for table, column in (("audit_events", "run_id"), ("runs", "id")):
        _execute(evidence, f"UPDATE {table} SET tenant = 'bank' WHERE {column} = %s", evidence.runs["succeeded"])


def move_a_row_to_another_tenant(evidence: Evidence) -> None:
    _execute(evidence, "UPDATE runs SET tenant = 'bank' WHERE id = %s", evidence.runs["succeeded"])


def edit_a_payload(evidence: Evidence) -> None:
    run = evidence.runs["succeeded"]
    _execute(evidence, "UPDATE audit_payloads SET payload = '\"no\"' WHERE run_id = %s AND seq = 1", run)


def delete_a_payload(evidence: Evidence) -> None:
    _execute(evidence, "DELETE FROM audit_payloads WHERE run_id = %s AND seq = 1", evidence.runs["succeeded"])


def plant_a_payload(evidence: Evidence) -> None:
    statement = "INSERT INTO audit_payloads VALUES (%s, 2, sha256('salt'), '{}')"
    _execute(evidence, statement, evidence.runs["succeeded"])


def edit_the_state(evidence: Evidence) -> None:
    run = evidence.runs["succeeded"]
    _execute(evidence, "UPDATE runs SET status = 'failed', stop_reason = 'max_cost' WHERE id = %s", run)


def add_a_run(evidence: Evidence) -> None:
    columns = "tenant, api_key_id, request_id, agent, agent_version, input, metadata, limits, priority, request_hash"
    _execute(
        evidence,
        f"""
        INSERT INTO runs (id, {columns}, status) SELECT gen_random_uuid(), {columns}, 'queued' FROM runs WHERE id = %s
        """,
        evidence.runs["succeeded"],
    )


def leave_a_gap_in_what_is_not_sealed(evidence: Evidence) -> None:
    """Its other hashes fit."""
    for table in ("audit_events", "audit_payloads"):
        _execute(evidence, f"DELETE FROM {table} WHERE run_id = %s AND seq = 3", evidence.runs["not sealed"])
    evidence.rechain("not sealed")


def lend_an_event_to_another_tenant(evidence: Evidence) -> None:
    """One that is not sealed, and all hashes fit."""
    run = evidence.runs["not sealed"]
    _execute(evidence, "UPDATE audit_events SET tenant = 'bank' WHERE run_id = %s AND seq = 3", run)
    evidence.rechain("not sealed")


def rewrite_what_is_not_sealed(evidence: Evidence) -> None:
    _execute(evidence, EDIT, evidence.runs["not sealed"])
    evidence.rechain("not sealed")


def truncate_what_is_not_sealed(evidence: Evidence) -> None:
    """Of a run that no checkpoint has seen: its tail, its head, and its row to go with them."""
    run = evidence.runs["not sealed"]
    for table in ("audit_events", "audit_payloads"):
        _execute(evidence, f"DELETE FROM {table} WHERE run_id = %s AND seq > 1", run)
    evidence.rechain("not sealed")
    state = "status = 'queued', stop_reason = NULL, ended_at = NULL, needs_enqueue = false"
    _execute(evidence, f"UPDATE runs SET {state} WHERE id = %s", run)


def _execute(evidence: Evidence, statement: str, *parameters: object) -> None:
    with evidence.connect() as connection:
        assert connection.execute(statement.encode(), parameters).rowcount > 0


ATTEMPTS = [
    Attempt("edit an event", edit_an_event, (Check.CHAIN,)),
    Attempt("delete an event", delete_an_event, (Check.CHAIN,)),
    Attempt("reorder two events", reorder_two_events, (Check.CHAIN,)),
    Attempt("insert an event, with room made for it and a new head", insert_an_event, (Check.CHAIN, Check.LEAF)),
    Attempt("truncate the tail", truncate_the_tail, (Check.HEAD, Check.LEAF, Check.RUN)),
    Attempt("truncate the tail and rewrite the head", truncate_the_tail_and_the_head, (Check.LEAF, Check.RUN)),
    Attempt("rewrite a head", rewrite_a_head, (Check.HEAD,)),
    Attempt("rewrite a run's whole chain so that it fits", rewrite_a_chain, (Check.LEAF,)),
    Attempt("… and its leaves", rewrite_a_chain_and_its_leaves, (Check.ROOT,)),
    Attempt(
        "… and all checkpoints, signed with another key", rewrite_up_to_the_checkpoints, (Check.SIGNATURE, Check.ANCHOR)
    ),
    Attempt("… signed with the real key", rewrite_with_the_signing_key, (Check.ANCHOR,)),
    Attempt("… with the real key, and rewrite the anchor too", rewrite_with_the_signing_key_and_the_anchor, ()),
    Attempt(
        "… but leave the checkpoints after the one that saw the run", replace_an_older_checkpoint, (Check.SEQUENCE,)
    ),
    Attempt("edit a leaf", edit_a_leaf, (Check.LEAF, Check.ROOT)),
    Attempt("forge the next checkpoint with another key, and anchor it", forge_a_checkpoint, (Check.SIGNATURE,)),
    Attempt("delete a checkpoint", delete_a_checkpoint, (Check.SEQUENCE, Check.ANCHOR)),
    Attempt("delete the newest checkpoint", delete_the_newest_checkpoint, (Check.ANCHOR,)),
    Attempt("take a checkpoint from the anchor", take_a_checkpoint_from_the_anchor, (Check.ANCHOR,)),
    Attempt("delete the newest checkpoint, and take it from the anchor too", cut_database_and_anchor_back, ()),
    Attempt("anchor another checkpoint beside the real one", anchor_another_beside, (Check.ANCHOR,)),
    Attempt("delete a run with all that belongs to it", delete_a_run, (Check.LEAF,)),
    Attempt("delete a run's row", delete_a_runs_row, (Check.RUN,)),
    Attempt("swap the events of two runs", swap_two_runs, (Check.CHAIN, Check.HEAD, Check.LEAF)),
    Attempt("give a run to another tenant", move_to_another_tenant, (Check.CHAIN,)),
    Attempt("give a run's row alone to another tenant", move_a_row_to_another_tenant, (Check.RUN,)),
    Attempt("edit a payload", edit_a_payload, (Check.PAYLOAD,)),
    Attempt("delete a payload silently", delete_a_payload, (Check.PAYLOAD,)),
    Attempt("plant a payload beside an event that had none", plant_a_payload, (Check.PAYLOAD,)),
    Attempt("edit the state of a run", edit_the_state, (Check.RUN,)),
    Attempt("add a run without an audit", add_a_run, (Check.RUN,)),
    Attempt(
        "delete an event that no checkpoint has seen, and rehash", leave_a_gap_in_what_is_not_sealed, (Check.CHAIN,)
    ),
    Attempt(
        "give one event that no checkpoint has seen to another tenant, and rehash",
        lend_an_event_to_another_tenant,
        (Check.CHAIN,),
    ),
    Attempt("rewrite a chain that no checkpoint has seen so that it fits", rewrite_what_is_not_sealed, ()),
    Attempt("truncate what no checkpoint has seen: events, head and run together", truncate_what_is_not_sealed, ()),
]
RESTORE = Attempt("restore an old backup of the database", lambda evidence: None, (Check.ANCHOR,))
"""Done by its own test: it takes another database."""


def table() -> list[str]:
    """As the documentation shows it, in Markdown."""
    rows = [(attempt.what, ", ".join(f"`{check}`" for check in attempt.seen)) for attempt in [*ATTEMPTS, RESTORE]]
    return ["| attempt | seen by |", "|---|---|", *(f"| {what} | {seen or '**nothing**'} |" for what, seen in rows)]
