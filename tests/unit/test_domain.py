"""Runs, agents, prices, identifiers: what holds without a server."""

import subprocess
import sys
from decimal import Decimal

import pytest
from pydantic import JsonValue, ValidationError

from app.domain.agent import Agent, Limits
from app.domain.canonical import canonical_json, digest, storable
from app.domain.errors import ConfigurationError
from app.domain.ids import new_id
from app.domain.run import TRANSITIONS, RunStatus, StopReason
from app.domain.step import Usage
from app.prices import PriceTable, load_prices
from app.registry import Registry, load_agents
from tests.agents import echo


def test_terminal_states_have_no_way_out_and_all_others_have_one() -> None:
    terminal = {status for status in RunStatus if status.is_terminal}
    assert terminal == {RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED}
    assert set(TRANSITIONS) == set(RunStatus)


def test_every_stop_reason_ends_in_a_terminal_state() -> None:
    assert all(reason.status.is_terminal for reason in StopReason)
    succeeding = [reason for reason in StopReason if reason.status is RunStatus.SUCCEEDED]
    assert succeeding == [StopReason.FINAL_ANSWER, StopReason.PERSON_ANSWERED]


def test_ids_sort_by_time_and_are_version_7() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert [identifier.int >> 80 for identifier in ids] == sorted(identifier.int >> 80 for identifier in ids)
    assert {(identifier.version, identifier.variant) for identifier in ids} == {(7, "specified in RFC 4122")}


def test_the_order_of_keys_does_not_change_a_digest() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null]}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_what_postgres_refuses_is_replaced() -> None:
    odd: JsonValue = {"a\0": ["\ud800x", float("nan"), 1.5, {"b": "fine"}], "c": None}
    assert storable(odd) == {"a\ufffd": ["\ufffdx", None, 1.5, {"b": "fine"}], "c": None}


def test_a_call_costs_its_fresh_cached_and_output_tokens() -> None:
    price = load_prices()["gpt-5-mini"]
    assert price is not None
    usage = Usage(input_tokens=1_000_000, cached_tokens=400_000, output_tokens=100_000)
    assert price.of(usage) == Decimal("0.15") + Decimal("0.01") + Decimal("0.20")


def test_a_dated_model_costs_what_its_base_costs_and_an_unknown_one_has_no_price() -> None:
    prices = load_prices()
    assert prices["gpt-5-mini-2025-08-07"] == prices["gpt-5-mini"]
    assert prices["gpt-5-mini-turbo"] is None


def test_another_price_table_has_another_digest() -> None:
    one = PriceTable('[models]\n"m" = { input = "1", cached_input = "1", output = "1" }')
    two = PriceTable('[models]\n"m" = { input = "2", cached_input = "1", output = "1" }')
    assert one.digest != two.digest


def test_no_limit_can_be_switched_off() -> None:
    for name in Limits.model_fields:
        for nothing in (-1, float("inf")):
            with pytest.raises(ValidationError):
                Limits.model_validate({name: nothing})


@pytest.mark.parametrize("name", ["", "Support", "a b", "1st", "x" * 65])
def test_an_agent_name_must_fit_a_url_and_a_label(name: str) -> None:
    with pytest.raises(ValueError, match="agent name"):
        Agent(name=name, instructions="")


def test_an_agent_lists_a_tool_once() -> None:
    with pytest.raises(ValueError, match="lists a tool twice: echo"):
        Agent(name="twice", instructions="", tools=(echo, echo))


def test_two_agents_of_one_name_stop_the_start() -> None:
    with pytest.raises(ConfigurationError, match="two agents are named 'same'"):
        Registry([Agent(name="same", instructions="a"), Agent(name="same", instructions="b")])


def test_a_package_that_cannot_be_imported_stops_the_start_and_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"AGENTS: cannot import no\.such\.package: ModuleNotFoundError"):
        load_agents(["no.such.package"])


def test_the_agents_of_a_package_are_found() -> None:
    assert {"toolbox", "typed", "bench"} <= set(load_agents(["tests.agents"]))


def test_the_api_loads_no_model_or_tracing_sdk() -> None:
    unwanted = ("openai", "langfuse", "opentelemetry", "worker")
    program = f"import sys, app.main; print([name for name in {unwanted!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
