"""What people and models wrote can be erased for good; what happened stays, and still holds."""

import asyncio
from collections.abc import Iterator
from uuid import UUID, uuid4

import click.testing
import httpx
import psycopg
import pytest

from app.audit.report import Check
from app.db import erasure
from app.db.engine import make_engine
from app.db.erasure import Erased
from tests.audit.evidence import Evidence
from tests.scripts import Reply, Run, Script, call, rest, say, steps_of
from tests.stack import Stack


@pytest.fixture
def service(stack: Stack) -> Evidence:
    """The running service's own database."""
    return Evidence(
        database_url=stack.database_url,
        owner_url=stack.owner_url,
        anchor=stack.audit_anchor,
        private_pem=stack.sealing_env["AUDIT_SIGNING_KEY"],
    )


@pytest.fixture
def marker() -> str:
    """What one person wrote, and nobody else."""
    return f"Rumpelstiltskin-{uuid4().hex}"


def erase(evidence: Evidence, *words: str, **env: str) -> click.testing.Result:
    return evidence.audit("erase", "--reason", "asked for it", "--yes", *words, **env)


def everywhere(owner_url: str, text: str) -> Iterator[str]:
    """Where in the database a text is: tables, and what the planner has noted of them."""
    needles = (text.encode(), text.encode().hex().encode())
    with psycopg.connect(owner_url) as connection:
        tables = connection.execute("SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in [*tables.fetchall(), ("pg_catalog.pg_stats",)]:
            with connection.cursor().copy(f"COPY (SELECT * FROM {table}) TO STDOUT") as copy:
                content = b"".join(map(bytes, copy))
            if any(needle in content for needle in needles):
                yield table


def decided(client: httpx.Client, run: Run, decision: str, **more: object) -> Run:
    """Decide the only review that is open, and wait for what the run does then."""
    pending = client.get("/v1/reviews", params={"status": "pending"}).json()["data"]
    [review] = [review for review in pending if review["run_id"] == run["id"]]
    body = {"decision": decision, "args_hash": review["args_hash"], **more}
    response = client.post(f"/v1/reviews/{review['id']}/decision", json=body)
    assert response.status_code == 200, response.text
    return rest(client, run)


def start(client: httpx.Client, stack: Stack, agent: str, marker: str, *replies: Reply) -> Run:
    """A run that holds the marker wherever its submitter may write."""
    script = Script(stack.model_url, list(replies))
    run = client.post(
        "/v1/runs",
        json={"agent": agent, "input": f"{script.input} {marker}", "metadata": {"customer": marker, marker: "x"}},
        headers={"Idempotency-Key": f"{marker}-{uuid4().hex[:6]}"},
    )
    assert run.status_code == 202, run.text
    return rest(client, run.json())


def test_nothing_that_a_subject_wrote_is_left(
    client: httpx.Client, stack: Stack, service: Evidence, tenant: str, marker: str
) -> None:
    done = say(f"done, {marker}")
    replies = [call("echo", {"text": marker}), call(f"made-up-{marker}"), call("echo", f"no JSON, {marker}")]
    replies += [call("refuse", {"why": marker})]
    replies[0]["content"] = f"hm, {marker}"
    answered = start(client, stack, "toolbox", marker, *replies, done)
    assert (answered["status"], answered["output"]) == ("succeeded", f"done, {marker}")
    edited = start(client, stack, "doorkeeper", marker, call("echo", {"text": marker}), done)
    edited = decided(client, edited, "edit", arguments={"text": f"rather {marker}"}, reason=marker)
    if edited["status"] == "waiting":  # the edited arguments need approval, too
        edited = decided(client, edited, "approve", reason=marker)
    doubtful = start(client, stack, "toolbox", marker, call("charge_and_crash", {"amount": "5"}), done)
    doubtful = decided(client, doubtful, "respond", response=f"paid by {marker}")
    rejected = start(client, stack, "doorkeeper", marker, call("echo", {"text": marker}))
    rejected = decided(client, rejected, "reject", reason=f"not for {marker}", end_run=True)
    assert [run["status"] for run in (edited, doubtful, rejected)] == ["succeeded", "succeeded", "failed"]
    with psycopg.connect(service.owner_url, autocommit=True) as connection:
        connection.execute("ANALYZE")
    before = set(everywhere(service.owner_url, marker))
    assert before >= {"public.runs", "public.steps", "public.reviews", "public.audit_payloads"}

    result = erase(service, "--tenant", tenant, "--subject", f"customer={marker}")
    assert (result.exit_code, result.stdout.count("  erased\n")) == (0, 4), result.output
    assert list(everywhere(service.owner_url, marker)) == []
    assert service.verify("--since-run", answered["id"])["holds"]

    for run in (answered, edited, doubtful, rejected):
        now = client.get(f"/v1/runs/{run['id']}").json()
        assert (now["input"], now["output"], now["error"], now["metadata"]) == (None, None, None, {})
        assert (now["status"], now["stop_reason"], now["usage"]) == (run["status"], run["stop_reason"], run["usage"])
        assert now["erased_at"]
        for step in steps_of(client, run):
            if step["kind"] == "model":
                assert (step["content"], step["correction"]) == (None, None)
                assert all(marker not in asked["name"] for asked in step["tool_calls"])
                assert all(asked["arguments"] == "" for asked in step["tool_calls"])
            else:
                assert (step["arguments"], step["result"]) == (None, None)
                assert bool(step["tool"]) == bool(step["effect"])  # the name of a tool that there is
        events = client.get(f"/v1/runs/{run['id']}/audit").json()["data"]
        assert "run.erased" in [event["kind"] for event in events]
    for review in client.get("/v1/reviews").json()["data"]:
        shown = client.get(f"/v1/reviews/{review['id']}").json()
        assert (shown["arguments"], shown["reason"], shown["response"]) == (None, None, None)


def test_the_erasure_is_itself_an_event(evidence: Evidence) -> None:
    payloads = sum(event.payload_sha256 is not None for event in evidence.events("succeeded"))
    assert erase(evidence, "--run", str(evidence.runs["succeeded"])).exit_code == 0
    event = evidence.events("succeeded")[-1]
    assert event.kind == "run.erased"
    assert event.actor.startswith("operator:")
    assert event.data == f'{{"by":"{event.actor}","payloads":{payloads},"why":"asked for it"}}'
    assert evidence.verify()["holds"]


def test_erasing_again_changes_nothing(evidence: Evidence) -> None:
    words = ("--run", str(evidence.runs["succeeded"]))
    erase(evidence, *words)
    before = evidence.events("succeeded")
    again = erase(evidence, *words)
    assert (again.exit_code, again.stdout) == (0, f"{evidence.runs['succeeded']}  erased before\n")
    assert evidence.events("succeeded") == before


def row_of(evidence: Evidence, run: str) -> tuple[object, ...] | None:
    with psycopg.connect(evidence.owner_url) as connection:
        return connection.execute("SELECT * FROM runs WHERE id = %s", [evidence.runs[run]]).fetchone()


def test_a_run_that_has_not_ended_is_named_and_left_alone_and_the_others_are_erased(evidence: Evidence) -> None:
    waiting, failed = evidence.runs["waiting"], evidence.runs["failed"]
    unknown = UUID("01890000-0000-7000-8000-000000000000")
    before = row_of(evidence, "waiting"), evidence.events("waiting")
    result = erase(evidence, *(word for run in (waiting, failed, unknown) for word in ("--run", str(run))))
    assert result.exit_code == 1
    assert f"{waiting}  has not ended, nothing of it is erased" in result.stdout
    assert f"{unknown}  no such run" in result.stdout
    assert f"{failed}  erased\n" in result.stdout
    assert (row_of(evidence, "waiting"), evidence.events("waiting")) == before


def test_a_run_that_goes_on_meanwhile_is_left_alone(evidence: Evidence) -> None:
    """It had ended as far as the command knew."""

    async def attempt() -> Erased:
        engine = make_engine(evidence.owner_url, pool_size=1, application_name="test")
        try:
            return await erasure.erase(engine, evidence.runs["waiting"], why="none", actor="operator:test")
        finally:
            await engine.dispose()

    before = row_of(evidence, "waiting"), evidence.events("waiting")
    assert asyncio.run(attempt()) is Erased.ACTIVE
    assert (row_of(evidence, "waiting"), evidence.events("waiting")) == before


def test_no_hash_is_left_that_could_be_guessed_at(evidence: Evidence) -> None:
    cancelled = evidence.runs["cancelled"]
    assert erase(evidence, "--run", str(cancelled)).exit_code == 0
    with psycopg.connect(evidence.owner_url) as connection:
        runs = connection.execute("SELECT request_hash FROM runs WHERE id = %s", [cancelled]).fetchall()
        reviews = connection.execute("SELECT args_hash, why FROM reviews WHERE run_id = %s", [cancelled]).fetchall()
    assert (runs, reviews) == ([(b"",)], [("", "")])


def test_a_dry_run_and_a_no_change_nothing(evidence: Evidence) -> None:
    words = ("erase", "--run", str(evidence.runs["failed"]), "--reason", "none")
    before = row_of(evidence, "failed"), evidence.events("failed")
    dry = evidence.audit(*words, "--dry-run")
    assert (dry.exit_code, dry.stdout) == (0, f"{evidence.runs['failed']}  would be erased\n")
    assert evidence.audit(*words, input="n\n").exit_code == 1
    assert (row_of(evidence, "failed"), evidence.events("failed")) == before
    assert evidence.audit(*words, input="y\n").exit_code == 0
    assert row_of(evidence, "failed") != before[0]


def test_only_the_tenants_own_subject_is_erased(evidence: Evidence) -> None:
    with psycopg.connect(evidence.owner_url) as connection:
        for run in ("alike", "failed", "of another tenant"):
            connection.execute("""UPDATE runs SET metadata = '{"customer": "7"}' WHERE id = %s""", [evidence.runs[run]])
        connection.execute(
            """UPDATE runs SET metadata = '{"customer": 7}' WHERE id = %s""", [evidence.runs["succeeded"]]
        )
    result = erase(evidence, "--tenant", "shop", "--subject", "customer=7")
    assert sorted(result.stdout.split()[::2]) == sorted(str(evidence.runs[run]) for run in ("alike", "failed"))
    nobody = erase(evidence, "--tenant", "shop", "--subject", "customer=8")
    assert (nobody.exit_code, nobody.stdout, nobody.stderr) == (0, "", "No run matches.\n")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--tenant", "shop"),
        ("--subject", "customer=7"),
        ("--tenant", "shop", "--subject", "customer"),
        ("--tenant", "shop", "--subject", "=7"),
        ("--run", "01890000-0000-7000-8000-000000000000", "--tenant", "shop"),
    ],
)
def test_what_is_to_be_erased_has_to_be_said_exactly(evidence: Evidence, words: tuple[str, ...]) -> None:
    assert erase(evidence, *words).exit_code == 2


def test_the_services_own_user_cannot_erase(evidence: Evidence) -> None:
    result = erase(evidence, "--run", str(evidence.runs["failed"]), OWNER_DATABASE_URL="")
    assert "OWNER_DATABASE_URL: only the owner" in str(result.exception)
    assert evidence.events("failed")[-1].kind != "run.erased"


def test_retention_erases_what_ended_long_ago(evidence: Evidence) -> None:
    with psycopg.connect(evidence.owner_url) as connection:
        for run, days in (("succeeded", 366), ("of another tenant", 366), ("alike", 364)):
            statement = "UPDATE runs SET ended_at = now() - make_interval(days => %s) WHERE id = %s"
            connection.execute(statement, [days, evidence.runs[run]])
    retain = ("retain", "--older-than", "365d")
    assert evidence.audit(*retain, "--dry-run").stderr == "2 runs would be erased.\n"
    assert evidence.audit(*retain, "--tenant", "bank").stderr == "1 runs erased.\n"
    assert evidence.audit(*retain).stderr == "1 runs erased.\n"
    assert evidence.audit(*retain).stderr == "0 runs erased.\n"
    assert {run for run in evidence.runs if evidence.events(run)[-1].kind == "run.erased"} == {
        "succeeded",
        "of another tenant",
    }
    assert evidence.verify()["holds"]


def test_payloads_that_come_back_after_they_were_erased_are_seen(evidence: Evidence) -> None:
    run = evidence.runs["succeeded"]
    with evidence.connect() as connection:
        kept = connection.execute("SELECT * FROM audit_payloads WHERE run_id = %s AND seq = 1", [run]).fetchone()
        erase(evidence, "--run", str(run))
        connection.execute("INSERT INTO audit_payloads VALUES (%s, %s, %s, %s)", kept)
    [finding] = evidence.verify()["findings"]
    assert (finding["check"], finding["subject"]) == (Check.PAYLOAD, str(run))
    assert erase(evidence, "--run", str(run)).stdout.endswith("  erased\n")
    assert evidence.verify()["holds"]
