"""What has to be true of every run once a fault is over, seen from outside: Postgres, Redis, the ledger, `rq info`.

`broken(rig, runs)` lists what is not true; `lost` and `doubled` are the two that nobody forgives.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from app.audit.proof import Event, event_hash
from tests.faults.rig import TENANT, TERMINAL, Rig, Row

MOST_A_CALL_COSTS = Decimal("0.02")
_ENDS = {"run.succeeded": "succeeded", "run.failed": "failed", "run.cancelled": "cancelled"}
_ANSWERED = ("succeeded", "failed", "crashed", "invalid", "rejected")
_UNOWNED = ("run.requeued", "run.suspended", *_ENDS)
"""After these events no worker holds the run."""


@dataclass
class Findings:
    """What is broken, in words; `lost`: accepted runs without an end; `doubled`: effects that happened twice."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Everything else: the record contradicts itself, the ledger, or Redis."""

    @property
    def all(self) -> list[str]:
        return [*self.lost, *self.doubled, *self.wrong]


def broken(rig: Rig, run_ids: Sequence[str]) -> Findings:
    """Look at these runs, after they have come to rest."""
    wanted = [list(run_ids)]
    runs = {str(row["id"]): row for row in rig.rows("SELECT * FROM runs WHERE id = ANY(%s::uuid[])", wanted)}
    steps = _by_run(rig.rows("SELECT * FROM steps WHERE run_id = ANY(%s::uuid[]) ORDER BY run_id, seq", wanted))
    events = _by_run(
        rig.rows(
            "SELECT *, data::text AS text FROM audit_events WHERE run_id = ANY(%s::uuid[]) ORDER BY run_id, seq", wanted
        )
    )
    heads = {
        str(row["run_id"]): row for row in rig.rows("SELECT * FROM audit_heads WHERE run_id = ANY(%s::uuid[])", wanted)
    }
    reviews = _by_run(rig.rows("SELECT * FROM reviews WHERE run_id = ANY(%s::uuid[])", wanted))
    arrived = {kind: rig.ledger.arrivals(kind) for kind in ("put", "charge")}
    findings = Findings()
    for run_id in run_ids:
        run = runs.get(run_id)
        if run is None or run["status"] not in TERMINAL:
            findings.lost.append(f"{run_id} was accepted and is {run['status'] if run else 'unknown'}")
            continue
        findings.wrong += [f"{run_id}: {what}" for what in _record(run, steps[run_id], events[run_id])]
        findings.wrong += [f"{run_id}: {what}" for what in _chain(heads.get(run_id), events[run_id])]
        findings.wrong += [
            f"{run_id}: {what}" for what in _reviews(arrived["charge"], run, reviews[run_id], events[run_id])
        ]
        findings.wrong += [f"{run_id}: {what}" for what in _effects_missing(arrived, run, steps[run_id])]
    findings.doubled += _doubled(rig, set(run_ids))
    findings.wrong += _left_in_redis(rig, set(run_ids))
    findings.wrong += _budget(rig)
    return findings


def _by_run(rows: list[Row]) -> defaultdict[str, list[Row]]:
    grouped: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[str(row["run_id"])].append(row)
    return grouped


def _record(run: Row, steps: list[Row], events: list[Row]) -> Iterator[str]:
    """The run's row, its steps and its audit tell the same story."""
    if [step["seq"] for step in steps] != list(range(len(steps))):
        yield f"its steps have gaps: {[step['seq'] for step in steps]}"
    if [event["seq"] for event in events] != list(range(1, len(events) + 1)):
        yield f"its audit has gaps: {[event['seq'] for event in events]}"
    kinds = Counter(event["kind"] for event in events)
    ends = [event["kind"] for event in events if event["kind"] in _ENDS]
    if [_ENDS[end] for end in ends] != [run["status"]]:
        yield f"it is {run['status']}, and its audit says {ends}"
    elif events[-1]["kind"] not in _ENDS:
        yield f"after its end the audit goes on with {events[-1]['kind']}"
    replies = [step for step in steps if step["kind"] == "model"]
    if not len(replies) == run["model_calls"] == kinds["model.replied"]:
        yield f"{len(replies)} replies, {run['model_calls']} counted, {kinds['model.replied']} in the audit"
    if run["attempt"] != kinds["run.claimed"]:
        yield f"attempt {run['attempt']}, and {kinds['run.claimed']} claims in the audit"
    yield from _stale_writes(events)
    answers = Counter(
        event["data"]["step"] for event in events if event["kind"] == "tool.answered" and _is_answer(event)
    )
    for step in steps:
        if step["kind"] == "tool" and answers[step["seq"]] != (step["state"] in _ANSWERED):
            yield f"step {step['seq']} is {step['state']}, with {answers[step['seq']]} answers in the audit"


def _chain(head: Row | None, events: list[Row]) -> Iterator[str]:
    """The audit is a chain of hashes, and its head is the last of them."""
    previous = None
    for row in events:
        event = Event(**{name: row[name] for name in Event._fields} | {"data": row["text"]})
        if event.hash != event_hash(event, previous):
            yield f"event {event.seq} breaks the chain"
        previous = event.hash
    if head is None or (head["seq"], head["hash"]) != (len(events), previous):
        yield f"the audit's head is {head}, its last event the {len(events)}th"


def _reviews(charged: Counter[str], run: Row, reviews: list[Row], events: list[Row]) -> Iterator[str]:
    """Each was asked and decided once, none is left over, and what needed approval happened only with it."""
    for kind, states in (("review.requested", None), ("review.decided", ("decided",))):
        recorded = Counter(event["data"]["id"] for event in events if event["kind"] == kind)
        wanted = Counter(str(review["id"]) for review in reviews if states is None or review["status"] in states)
        if recorded != wanted:
            yield f"its audit has {kind} of {dict(recorded)}, its reviews say {dict(wanted)}"
    for review in reviews:
        if review["status"] == "pending":
            yield f"review {review['id']} still waits for a decision"
        allowed = review["decision"] in ("approve", "edit")
        if review["kind"] == "approval" and not allowed and charged[f"{run['id']}:{review['seq']}"]:
            yield f"step {review['seq']} was charged, and its review is {review['status']}: {review['decision']}"


def _is_answer(event: Row) -> bool:
    return event["data"]["state"] in _ANSWERED


def _stale_writes(events: list[Row]) -> Iterator[str]:
    """Whatever a worker wrote, it wrote while it held the run."""
    holder = None
    for event in events:
        actor, kind = event["actor"], event["kind"]
        if kind == "run.claimed":
            holder = actor
        elif actor.startswith("worker:") and actor != holder:
            yield f"{actor} wrote {kind} as event {event['seq']} while {holder} held the run"
        if kind in _UNOWNED:
            holder = None


def _effects_missing(arrived: dict[str, Counter[str]], run: Row, steps: list[Row]) -> Iterator[str]:
    """What the record calls done has arrived in the ledger."""
    for step in steps:
        if step["kind"] != "tool" or step["state"] != "succeeded":
            continue
        kind, key = step["body"]["tool"], f"{run['id']}:{step['seq']}"
        if kind in arrived and not arrived[kind][key]:
            yield f"step {step['seq']} says that {kind} succeeded, and the ledger has never heard of it"


def _doubled(rig: Rig, run_ids: set[str]) -> Iterator[str]:
    for key, arrived in rig.ledger.arrivals("charge").items():
        if key.partition(":")[0] in run_ids and arrived > 1:
            yield f"{key} was charged {arrived} times"
    for kind in ("put", "charge"):
        for (run_id, call), keys in rig.ledger.keys_of_calls(kind).items():
            if run_id in run_ids and len(keys) > 1:
                yield f"{run_id}: {kind} of {call} came under {len(keys)} keys: {sorted(keys)}"


def _budget(rig: Rig) -> Iterator[str]:
    """Nothing stays reserved once all runs are at rest, and what is spent is what the steps of the day have cost.

    A call that a cancel or a deadline broke off counts as the most that it may have cost, which no step says.
    """
    [found] = rig.rows(
        """
        SELECT budgets.*, began, (
            SELECT sum(reserved_usd) FROM runs WHERE tenant = %(tenant)s
        ) AS held, (
            SELECT coalesce(sum(round((steps.body ->> 'cost_usd')::numeric, 8)), 0) FROM steps JOIN runs ON id = run_id
            WHERE tenant = %(tenant)s AND steps.kind = 'model' AND recorded_at >= began
        ) AS recorded, (
            SELECT count(*) FROM runs
            WHERE tenant = %(tenant)s AND stop_reason IN ('cancelled', 'deadline') AND ended_at >= began
        ) AS broken_off
        FROM budgets, LATERAL (SELECT day::timestamp AT TIME ZONE 'UTC' AS began) AS today
        WHERE tenant = %(tenant)s
        """,
        {"tenant": TENANT},
    )
    if found["reserved_usd"] or found["held"]:
        yield f"{found['reserved_usd']} US dollars are reserved, and runs hold {found['held']}"
    unexplained = found["spent_usd"] - found["recorded"]
    if not 0 <= unexplained <= found["broken_off"] * MOST_A_CALL_COSTS:
        yield f"{found['spent_usd']} US dollars are spent, and the steps say {found['recorded']}"


def _left_in_redis(rig: Rig, run_ids: set[str]) -> Iterator[str]:
    """Nothing in Redis speaks of a run that has ended, RQ calls none failed, and the workers that live are idle."""

    def left() -> list[str]:
        with rig.redis() as connection:
            found = [
                *(f"job {key}" for key in connection.scan_iter("rq:job:*") if _id_in(str(key)) in run_ids),
                *(f"queued {name}" for name in connection.lrange("rq:queue:runs", 0, -1) if _id_in(name) in run_ids),
            ]
            for registry in ("rq:wip:runs", "rq:failed:runs", "rq:finished:runs"):
                members = connection.zrange(registry, 0, -1)
                found += [f"{registry} {name}" for name in members if str(name).partition(":")[0] in run_ids]
        info = rig.rq_info().splitlines()
        for worker in rig.workers:
            mine = [line for line in info if f" {worker.pid})" in line]
            if worker.is_running and (len(mine) != 1 or "): idle" not in mine[0]):
                found.append(f"rq info says of {worker.name}: {mine}")
        return found

    try:
        rig.until(lambda: not left(), seconds=20)
    except AssertionError:
        yield from left()


def _id_in(key: str) -> str:
    return key.rpartition(":")[2]
