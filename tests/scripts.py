"""What the stand-in model is to say in one run, and how to wait for that run."""

from typing import Any
from uuid import uuid4

import httpx

MODEL = httpx.Client(verify=False, trust_env=False)
"""For the stand-in model; a client of its own for every call would load the system's certificates each time."""

Reply = dict[str, Any]
DONE: Reply = {"content": "done"}


def say(content: str | None, **more: Any) -> Reply:
    return {"content": content, **more}


def call(tool: str, arguments: Any = None, **more: Any) -> Reply:
    """One tool call."""
    return calls((tool, arguments), **more)


def calls(*wanted: tuple[str, Any], **more: Any) -> Reply:
    """Several tool calls in one reply."""
    asked = [{"name": tool, "arguments": {} if arguments is None else arguments} for tool, arguments in wanted]
    return {"content": None, "tool_calls": asked, **more}


class Script:
    """Replies for one run: its name goes into the run's input, so that parallel runs don't meet."""

    def __init__(self, model_url: str, replies: list[Reply], *, model: str | None = None) -> None:
        self.name = uuid4().hex
        self._model_url = model_url
        self.add(replies, model=model)

    def add(self, replies: list[Reply], *, model: str | None = None) -> None:
        """Replies for requests to one model (by name), or to any."""
        name = f"{self.name}@{model}" if model else self.name
        MODEL.put(f"{self._model_url}/_scripts/{name}", json=replies).raise_for_status()

    @property
    def input(self) -> str:
        return f"script:{self.name}"

    def requests(self, *, model: str | None = None) -> list[dict[str, Any]]:
        """The bodies of the requests that the model has seen."""
        name = f"{self.name}@{model}" if model else self.name
        seen: list[dict[str, Any]] = MODEL.get(f"{self._model_url}/_scripts/{name}").json()["requests"]
        return seen


Run = dict[str, Any]
AT_REST = ("waiting", "succeeded", "failed", "cancelled")


def submit(client: httpx.Client, agent: str, run_input: Any, **more: Any) -> Run:
    """POST a run; it has to be accepted."""
    response = client.post("/v1/runs", json={"agent": agent, "input": run_input, **more})
    assert response.status_code == 202, response.text
    run: Run = response.json()
    return run


def rest(client: httpx.Client, run: Run, *, seconds: float = 30) -> Run:
    """Wait until the run has ended or waits for a person."""
    response = client.get(f"/v1/runs/{run['id']}", params={"wait": seconds}, timeout=seconds + 10)
    assert response.status_code == 200, response.text
    now: Run = response.json()
    assert now["status"] in AT_REST, now
    return now


def steps_of(client: httpx.Client, run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(f"/v1/runs/{run['id']}/steps").json()["data"]
    return found


def events_of(client: httpx.Client, run_id: str) -> list[dict[str, Any]]:
    """The run's audit, page by page: where an operator's key looks often, its own looking fills many."""
    events: list[dict[str, Any]] = []
    params = {"limit": "100"}
    while True:
        page = client.get(f"/v1/runs/{run_id}/audit", params=params).json()
        events += page["data"]
        if page["next_cursor"] is None:
            return events
        params["cursor"] = page["next_cursor"]


def audit_of(client: httpx.Client, run: Run) -> list[str]:
    """The kinds of the run's audit events, in order, but for those of our own looking."""
    return [event["kind"] for event in events_of(client, run["id"]) if event["kind"] != "run.read"]
