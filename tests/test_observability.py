"""Dashboards, alerts and the runbook: all that they name exists, and all that is exported is looked at."""

import re
import shlex
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import httpx
import psycopg
import pytest
import yaml

from app.cli import cli
from app.devstack.processes import Reaper
from app.devstack.stack import ROOT
from app.domain.run import RunStatus, StopReason
from tests.prometheus import (
    API_JOB,
    BOARDS,
    OBSERVABILITY,
    WORKER_JOB,
    Prometheus,
    Query,
    panels,
    queries,
    rules,
    where_prometheus_is,
)
from tests.promql import Exported, WrongQuery, labels_of, selectors
from tests.scripts import DONE, Script, call, rest, submit
from tests.stack import Stack

QUERIES = list(queries())
RULES = rules()
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
PARAGRAPHS = dict(re.findall(r"^### (\w+)\n\n(.*?)(?=^##|\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
UNITS = {"s", "percentunit", "short", "cpm", "cps", "reqps", "currencyUSD", "bytes", "none"}
AGENT = "clerk"
"""It has tools, reviews, and is known to every stack of the tests."""
NOT_SHOWN: dict[str, str] = {}
"""Metrics that are in no dashboard and no rule, and why."""
SILENT = {"Spans sent, by back end", "Spans dropped, by back end", "Wait for a decision"}
"""Panels that are empty where there is no tracing back end, and no person who has decided; `make bench` has both."""


@pytest.fixture(scope="module")
def exported(servers: Stack, reaper: Reaper) -> Exported:
    """What an API and a worker export when they have just started, and what the rules make of it."""
    worker = servers.another_worker("traced", OTLP_ENDPOINTS="http://127.0.0.1:9/v1/traces")
    api = servers.another_api("scraped")
    found = Exported()
    try:
        worker.spawn()
        api.spawn()
        for process in (worker, api):
            process.wait_ready()
            found.add(httpx.get(f"{process.address}/metrics", trust_env=False).text)
        found.add(httpx.get(f"{api.address}/metrics", trust_env=False).text)  # with the request before
    finally:
        worker.stop()
        api.stop()
    found.series["up"] = {"job": set(), "instance": set()}
    for rule in RULES:
        if "record" in rule:
            with suppress(WrongQuery):  # the rule's own test says what is wrong
                found.record(rule["record"], labels_of(rule["expr"], found))
    return found


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.board}: {query.panel}")
def test_a_panel_asks_for_what_is_exported(query: Query, exported: Exported) -> None:
    labels = labels_of(query.filled(agent=AGENT, interval="1m", span="6h"), exported)

    assert set(re.findall(r"{{(\w+)}}", query.legend)) <= labels


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_what_is_exported(rule: dict[str, Any], exported: Exported) -> None:
    labels = labels_of(rule["expr"], exported)

    told = " ".join(rule.get("annotations", {}).values())
    assert set(re.findall(r"\$labels\.(\w+)", told)) <= labels


def test_what_is_exported_is_shown_or_watched(exported: Exported) -> None:
    asked = [query.filled(agent=AGENT, interval="1m", span="6h") for query in QUERIES]
    used = {node.name for query in [*asked, *(rule["expr"] for rule in RULES)] for node in selectors(query)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported.series if name is not None}
    ours = {name for name in families if name.startswith(("agent_service", "gen_ai_", "http_server_"))}
    seen = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used if name}

    assert ours - seen == set(NOT_SHOWN)


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("sum(rate(agent_service_runs_finished_total[5m]))", "nobody exports"),
        ("sum by (model) (agent_service_runs)", "no model in"),
        ('agent_service_runs{state="queued"}', "has no label state"),
        ('agent_service_runs{status=~"queued|ended"}', "status is never ended"),
        ("sum by (agent) (agent_service_runs) / sum(agent_service_runs)", "never match"),
        ("histogram_quantile(0.5, sum(rate(agent_service_run_steps_bucket[5m])))", "no le in"),
        ("up and on (agent) agent_service_runs", "no agent on both sides"),
    ],
)
def test_a_query_for_what_does_not_exist_is_found(query: str, wrong: str, exported: Exported) -> None:
    with pytest.raises(WrongQuery, match=wrong):
        labels_of(query, exported)


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.stem)
class TestBoard:
    def test_every_panel_says_what_it_shows_and_in_which_unit(self, board: Path) -> None:
        for panel in panels(board):
            assert panel["targets"], panel["title"]
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}", panel["title"]

    def test_no_two_panels_share_an_id_or_a_place(self, board: Path) -> None:
        everything = yaml.safe_load(board.read_text())["panels"]
        places = [panel["gridPos"] for panel in everything]

        assert len({panel["id"] for panel in everything}) == len(everything)
        assert all(place["x"] + place["w"] <= 24 for place in places)
        assert not [pair for pair in combinations(places, 2) if _overlap(*pair)]

    def test_its_variables_can_be_filled(self, board: Path, exported: Exported) -> None:
        for variable in yaml.safe_load(board.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
                assert found is not None
                assert AGENT in exported.series[found[1]][found[2]]
                assert variable["datasource"]["uid"] == "${datasource}"


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )


def test_the_board_of_an_agent_shows_no_other_agents() -> None:
    for query in QUERIES:
        if query.board == "agent":
            for node in selectors(query.filled(agent="THIS", interval="1m", span="6h")):
                assert "THIS" in [matcher.value for matcher in node.matchers.matchers], (query.panel, node.name)


def test_every_stop_reason_counts_as_one_thing() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (`.*`) \|$", RUNBOOK, re.MULTILINE)
    kinds = {kind.strip(): set(re.findall(r"\w+", reasons)) for kind, reasons in rows}
    answers, faults, fruitless, decided = kinds.values()

    assert sorted([*answers, *faults, *fruitless, *decided]) == sorted(StopReason)
    assert answers == {reason for reason in StopReason if reason.status is RunStatus.SUCCEEDED}
    used = {
        frozenset(matcher.value.split("|"))
        for query in [*(query.filled(agent="a", interval="1m", span="6h") for query in QUERIES), *_expressions()]
        for node in selectors(query)
        for matcher in node.matchers.matchers
        if matcher.name == "stop_reason"
    }
    assert used == {frozenset(faults), frozenset(answers | faults), frozenset(fruitless)}


def _expressions() -> list[str]:
    return [rule["expr"] for rule in RULES]


def test_every_alert_has_its_paragraph_and_every_paragraph_its_alert() -> None:
    assert set(PARAGRAPHS) == set(ALERTS)
    for name, alert in ALERTS.items():
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"].endswith(".")
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        assert [word for word in ("**Means**", "**Look**", "**Do**") if word not in PARAGRAPHS[name]] == [], name


def test_every_alert_is_tested_where_it_fires_and_where_it_does_not() -> None:
    fires: dict[bool, set[str]] = {True: set(), False: set()}
    for file in ("rules_test.yml", "rules_days_test.yml"):
        for test in yaml.safe_load((OBSERVABILITY / "prometheus" / file).read_text())["tests"]:
            for check in test["alert_rule_test"]:
                fires[bool(check["exp_alerts"])].add(check["alertname"])

    assert fires == {True: set(ALERTS), False: set(ALERTS)}


def test_the_runbook_links_to_paragraphs_that_are_there() -> None:
    assert set(re.findall(r"\(#(\w+)\)", RUNBOOK)) <= {name.lower() for name in PARAGRAPHS}


def test_the_runbook_names_commands_that_exist() -> None:
    commands = re.findall(r"`agent-service ([^`]+)`", RUNBOOK)

    assert commands
    for command in commands:
        _check_command(cli, shlex.split(command))


def _check_command(command: click.Command, words: list[str]) -> None:
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert not isinstance(command, click.Group), words
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known, (command.name, words)


def test_the_runbook_names_requests_that_exist(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    requests = re.findall(r"`(GET|POST) (/[^`]*)`", RUNBOOK)

    assert requests
    assert [path for method, path in requests if method.lower() not in paths.get(path, {})] == []


def test_the_runbook_quotes_logs_that_are_written() -> None:
    source = "".join(path.read_text() for folder in ("app", "worker") for path in (ROOT / folder).rglob("*.py"))
    quoted = re.findall(r'`"([^"]+)"`', RUNBOOK)

    assert quoted
    assert [text for text in quoted if f'"{text}' not in source] == []


def test_the_runbook_names_panels_that_are_there() -> None:
    titles = {query.panel for query in QUERIES}
    named = re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", RUNBOOK.replace("\n", " "))

    assert named
    assert set(named) <= titles


def test_the_runbooks_sql_runs(owner_url: str) -> None:
    statements = re.findall(r"```sql\n(.*?)```", RUNBOOK, re.DOTALL)

    assert statements
    with psycopg.connect(owner_url) as connection:
        for statement in statements:
            connection.execute(statement)


def test_a_real_prometheus_answers_every_panel(
    stack: Stack, client: httpx.Client, reaper: Reaper, directory: Path
) -> None:
    try:
        where_prometheus_is()
    except RuntimeError as error:
        pytest.skip(str(error))
    targets = {API_JOB: [f"127.0.0.1:{stack.api.port}"], WORKER_JOB: [f"127.0.0.1:{stack.worker.port}"]}
    prometheus = Prometheus(directory, targets=targets, reaper=reaper)
    prometheus.start()
    try:
        stack.until(lambda: len(prometheus.ask("up == 1")) == 2)
        script = Script(stack.model_url, [call("echo", {"text": "hello"}), DONE])
        assert rest(client, submit(client, AGENT, script.input))["status"] == "succeeded"

        silent = {query.filled(agent=AGENT, interval="30s", span="1m"): query.panel for query in QUERIES}

        def only_these_are_silent() -> bool:
            for text in [text for text in silent if prometheus.ask(text)]:
                del silent[text]
            return set(silent.values()) <= SILENT

        with suppress(AssertionError):  # the one below says which
            stack.until(only_these_are_silent)
    finally:
        prometheus.stop()

    assert set(silent.values()) <= SILENT
