"""`agent-service demo`: one real run on a stack of its own, told step by step, with a person's approval in it."""

import json
import shutil
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from app.devstack.access import make_key
from app.devstack.dev import DATA, environment, stop_on_signals
from app.devstack.lock import exclusive, is_held
from app.devstack.processes import ProcessFailed, Reaper
from app.devstack.stack import Stack
from app.devstack.terminal import coloured
from app.domain.principal import Scope

AGENT = "support"
TASK = (
    "Hello! The teapot from my order A-1001 arrived with a broken spout. Please refund it. "
    "Do I have to send the broken one back?"
)
_POLL_SECONDS = 1
_LOOK_SECONDS = 0.02
"""How often it is looked whether an approved run goes on."""
_PATIENCE_SECONDS = 30
"""On top of the run's deadline: how long until a run that does not end is given up."""

Json = dict[str, Any]


def demo() -> bool:
    """Make one run and tell what happens. Did it succeed? Everything has been stopped again.

    Raises `ProcessFailed` where a part of the stack does not start or dies.
    """
    stop_on_signals()
    began = time.monotonic()
    with _scratch_directory() as directory, exclusive(directory) as lock, Reaper(keep_open=lock) as reaper:
        stack = Stack(directory, reaper=reaper, env=environment(), durable=False)
        model = "the stand-in model" if stack.model else "a real model"
        print(f"Starting PostgreSQL, Valkey, the API and a worker, with {model}.", flush=True)
        try:
            stack.start()
            print(f"Ready after {time.monotonic() - began:.1f} s.\n", flush=True)
            with (
                _client(stack, "customers", Scope.RUNS_READ, Scope.RUNS_WRITE) as client,
                _client(stack, "reviewer", Scope.REVIEWS_READ, Scope.REVIEWS_DECIDE) as reviewer,
            ):
                run = _watch(client, reviewer, _submit(client), stack)
            _conclude(run, with_stand_in=stack.model is not None)
        finally:
            stack.stop()
    return bool(run["status"] == "succeeded")


@contextmanager
def _scratch_directory() -> Iterator[Path]:
    """A directory for this demo alone; those of demos that were killed go as well."""
    DATA.mkdir(exist_ok=True)
    for left in DATA.glob("demo-*"):
        if not is_held(left):
            shutil.rmtree(left)
    directory = Path(tempfile.mkdtemp(prefix="demo-", dir=DATA))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _client(stack: Stack, name: str, *scopes: Scope) -> httpx.Client:
    """With a key of its own."""
    key = make_key(stack.database_url, tenant="demo", name=name, scopes=scopes)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=stack.api.address, headers=headers, timeout=30, trust_env=False)


def _submit(client: httpx.Client) -> Json:
    print(f"To the agent {AGENT!r}:\n\n{_paragraph(TASK)}\n")
    sent = time.monotonic()
    response = client.post("/v1/runs", json={"agent": AGENT, "input": TASK})
    took_ms = (time.monotonic() - sent) * 1000
    run = _json(response)
    print(f"POST /v1/runs: {response.status_code} after {took_ms:.0f} ms, run {run['id']}\n", flush=True)
    return run


def _watch(client: httpx.Client, reviewer: httpx.Client, run: Json, stack: Stack) -> Json:
    """Poll until the run has ended, tell every step once, and approve what it waits for. Returns the run's end."""
    give_up = time.monotonic() + run["limits"]["deadline_s"] + _PATIENCE_SECONDS
    path = f"/v1/runs/{run['id']}"
    told = 0
    while run["status"] in ("queued", "running", "waiting"):
        stack.check()
        if time.monotonic() > give_up:
            raise ProcessFailed(f"run {run['id']} does not end")
        run = _json(client.get(path, params={"wait": _POLL_SECONDS}))
        steps = [step for step in _json(client.get(f"{path}/steps"))["data"] if step.get("state") != "intended"]
        for step in steps[told:]:
            print(_tell_model_step(step) if step["kind"] == "model" else _tell_tool_step(step), flush=True)
        told = len(steps)
        if run["status"] == "waiting":
            _approve(reviewer, run)
            _wait_until_it_goes_on(client, path, give_up)
    return run


def _approve(reviewer: httpx.Client, run: Json) -> None:
    """Decide all that the run waits for, as a person who has read it."""
    print("\nThe run waits for a person; no worker holds it. What a reviewer, with a key of their own, is shown:\n")
    pending = _json(reviewer.get("/v1/reviews", params={"status": "pending"}))["data"]
    for review in (_json(reviewer.get(f"/v1/reviews/{each['id']}")) for each in pending if each["run_id"] == run["id"]):
        print(_tell_review(review))
        path = f"/v1/reviews/{review['id']}/decision"
        decided = _json(reviewer.post(path, json={"decision": "approve", "args_hash": review["args_hash"]}))
        print(f"\nPOST {path}: {decided['decision']}, pinned to what was shown", flush=True)


def _wait_until_it_goes_on(client: httpx.Client, path: str, give_up: float) -> None:
    """Call it right after the decision: tells how long the run took to be in a worker's hands again."""
    began = time.monotonic()
    while _json(client.get(path))["status"] in ("waiting", "queued"):
        if time.monotonic() > give_up:
            raise ProcessFailed("the run does not go on after its approval")
        time.sleep(_LOOK_SECONDS)
    print(f"The run went on {time.monotonic() - began:.2f} s after the decision.\n", flush=True)


def _tell_review(review: Json) -> str:
    proposal = f"{coloured(review['tool'], '33')}({_arguments(review['arguments'])})"
    effects = [(each["decision"], each["effect"]) for each in review["decisions"]]
    lines = [("why", review["why"]), ("proposal", proposal), *effects]
    indent = " " * 12
    return "\n".join(
        textwrap.fill(text, 112, initial_indent=f"  {name:10}", subsequent_indent=indent) for name, text in lines
    )


def _tell_model_step(step: Json) -> str:
    usage = step["usage"]
    calls = [call["name"] for call in step["tool_calls"]]
    what = f"asks for {' and '.join(calls)}" if calls else "answers"
    if step["correction"]:
        what = f"is corrected: {step['correction']}"
    numbers = [
        f"{usage['input_tokens']} tokens in ({usage['cached_tokens']} cached), {usage['output_tokens']} out",
        _dollars(step["cost_usd"]),
        _seconds(step["duration_ms"]),
    ]
    return f"{step['seq']:3}  {coloured(step['model'], '36')} {what}\n     {coloured(' · '.join(numbers), '2')}"


def _tell_tool_step(step: Json) -> str:
    result = textwrap.shorten(step["result"] or "", 150, placeholder=" …")
    about = f"{step['state']} · effect {step['effect']} · {_seconds(step['duration_ms'])}"
    call = f"{coloured(step['tool'], '33')}({_arguments(step['arguments'])})"
    return f"{step['seq']:3}  {call}\n     → {result}\n     {coloured(about, '2')}"


def _arguments(arguments: Any) -> str:
    """As in a call; where the model's did not fit, what it wrote."""
    if not isinstance(arguments, dict):
        return str(arguments)
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in arguments.items()}
    return ", ".join(f"{name}={textwrap.shorten(value, 80, placeholder=' …')}" for name, value in values.items())


def _conclude(run: Json, *, with_stand_in: bool) -> None:
    usage, output = run["usage"], run["output"]
    if run["status"] == "succeeded":
        print(f"\nThe answer:\n\n{_paragraph(output['answer'])}\n")
        print(f"  It cites: {', '.join(output['citations']) or 'nothing'}\n")
    elif run["error"]:
        print(f"\n{_paragraph(run['error'])}\n")
    tokens = usage["input_tokens"] + usage["output_tokens"]
    print(
        f"{coloured(run['status'], '32' if run['status'] == 'succeeded' else '31')} ({run['stop_reason']}): "
        f"{usage['model_calls']} model calls, {tokens} tokens, {_dollars(usage['cost_usd'])}"
        + (f", {_seconds(_duration_ms(run))} from the POST to the end" if run["ended_at"] else "")
    )
    if with_stand_in:
        print(
            "The stand-in model answered: rules on this machine. The cost is what the model named above would have"
            " cost.\nFor a real one: OPENAI_API_KEY=… make demo"
        )


def _duration_ms(run: Json) -> float:
    began, ended = (datetime.fromisoformat(run[name]) for name in ("created_at", "ended_at"))
    return (ended - began) / timedelta(milliseconds=1)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  ")


def _dollars(cost: float | None) -> str:
    return "no price" if cost is None else f"${cost:.6f}"


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s"


def _json(response: httpx.Response) -> Json:
    if response.is_error:
        raise ProcessFailed(f"{response.request.method} {response.request.url}: {response.status_code} {response.text}")
    body: Json = response.json()
    return body
