"""The stand-in model server as the real SDK sees it."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import uuid4

import httpx
import openai
import pytest
from openai import AsyncOpenAI, DefaultAioHttpClient
from openai.types.chat import ChatCompletion

T = TypeVar("T")
QUESTION = "How long may I keep something before I return it?"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "echo",
        "description": "Gives back its text.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    },
}


def start() -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "app.devstack.model_server", "--thinking-s", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


def stop(process: subprocess.Popen[str], signal_number: int = signal.SIGTERM) -> int:
    process.send_signal(signal_number)
    with process:
        return process.wait(timeout=5)


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    process, url = start()
    yield url
    assert stop(process) == 0


class Server:
    """The server under test, and a script of this test's own on it."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.root = base_url.removesuffix("/v1")
        self.name = uuid4().hex

    def script(self, *replies: dict[str, Any], model: str | None = None) -> None:
        name = f"{self.name}@{model}" if model else self.name
        httpx.put(f"{self.root}/_scripts/{name}", json=replies).raise_for_status()

    def requests(self) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = httpx.get(f"{self.root}/_scripts/{self.name}").json()["requests"]
        return seen

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncOpenAI]:
        http_client = DefaultAioHttpClient()
        async with AsyncOpenAI(api_key="k", base_url=self.base_url, max_retries=0, http_client=http_client) as client:
            yield client

    def use(self, block: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
        async def run() -> T:
            async with self.client() as client:
                return await block(client)

        return asyncio.run(run())

    def ask(self, text: str | None = None, **more: Any) -> ChatCompletion:
        messages = [{"role": "user", "content": text or f"Play script:{self.name}"}]
        request = {"model": "gpt-5-mini", "messages": messages, **more}
        answer: ChatCompletion = self.use(lambda client: client.chat.completions.create(**request))
        return answer


@pytest.fixture
def server(base_url: str) -> Server:
    return Server(base_url)


def test_a_scripted_reply_arrives_with_the_usage_it_names(server: Server) -> None:
    usage = {"prompt_tokens": 2_000, "completion_tokens": 7, "cached_tokens": 1_024}
    server.script({"content": "Good morning", "usage": usage, "finish_reason": "length"})
    answer = server.ask(model="gpt-4o")
    assert answer.model == "gpt-4o"
    assert answer.choices[0].message.content == "Good morning"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2_000, 7, 2_007)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1_024


def test_tool_calls_go_out_with_their_arguments_valid_or_not(server: Server) -> None:
    calls = [{"name": "echo", "arguments": {"text": "é"}}, {"name": "echo", "arguments": '{"text": '}]
    server.script({"tool_calls": calls})
    choice = server.ask(tools=[TOOL]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    functions = [call.function for call in choice.message.tool_calls if call.type == "function"]
    assert json.loads(functions[0].arguments) == {"text": "é"}
    assert functions[1].arguments == '{"text": '
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_replies_come_in_order_and_the_requests_are_kept(server: Server) -> None:
    server.script({"content": "one"}, {"content": "two"})
    assert [server.ask().choices[0].message.content for _ in range(2)] == ["one", "two"]
    with pytest.raises(openai.BadRequestError, match="is exhausted"):
        server.ask()
    assert [request["model"] for request in server.requests()] == ["gpt-5-mini"] * 3


def test_a_model_may_have_a_script_of_its_own(server: Server) -> None:
    server.script({"content": "any"})
    server.script({"fault": "status:503"}, model="gpt-5")
    with pytest.raises(openai.InternalServerError):
        server.ask(model="gpt-5")
    assert server.ask().choices[0].message.content == "any"


def test_an_unknown_script_is_an_error(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="is unknown"):
        server.ask()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_a_status_fault_is_an_error_in_openai_form(
    server: Server, status: int, error: type[openai.APIStatusError]
) -> None:
    server.script({"fault": f"status:{status}", "retry_after": "0.2"})
    with pytest.raises(error) as caught:
        server.ask()
    assert caught.value.status_code == status
    assert caught.value.response.headers["retry-after"] == "0.2"
    assert f"scripted {status}" in caught.value.message
    assert caught.value.type


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["disconnect", "truncated", "bad_json"])
def test_a_broken_reply_is_an_error_at_once_and_the_server_goes_on(server: Server, fault: str, stream: bool) -> None:
    async def read(client: AsyncOpenAI) -> None:
        messages: Any = [{"role": "user", "content": f"script:{server.name}"}]
        if not stream:
            await client.chat.completions.create(model="m", messages=messages)
            return
        async for _ in await client.chat.completions.create(model="m", messages=messages, stream=True):
            pass

    server.script({"content": "x" * 500, "fault": fault}, {"content": "well"})
    with pytest.raises((openai.APIConnectionError, json.JSONDecodeError)):
        server.use(read)
    server.use(read)


def test_a_stalled_reply_never_begins(server: Server) -> None:
    server.script({"fault": "stall"})
    with pytest.raises(openai.APITimeoutError):
        server.ask(timeout=0.3)


def test_a_dripping_reply_outlasts_a_timeout_between_two_reads(server: Server) -> None:
    server.script({"content": "slow", "fault": "slow_drip"})

    async def ask(client: AsyncOpenAI) -> None:
        async with asyncio.timeout(1.0):
            messages: Any = [{"role": "user", "content": f"script:{server.name}"}]
            timeout = openai.Timeout(0.5)
            await client.chat.completions.create(model="m", messages=messages, timeout=timeout)

    with pytest.raises(TimeoutError):
        server.use(ask)


def test_a_delay_comes_before_the_reply(server: Server) -> None:
    server.script({"content": "late", "delay_s": 0.3})
    began = time.monotonic()
    server.ask()
    assert time.monotonic() - began >= 0.3


def test_a_streamed_reply_is_the_same_in_pieces(server: Server) -> None:
    reply = {"content": "The quick brown fox jumps over the lazy dog, again and again", "tool_calls": []}
    call = {"tool_calls": [{"name": "echo", "arguments": {"text": "a fairly long text, in several pieces"}}]}
    server.script(reply, call)

    async def ask(client: AsyncOpenAI) -> ChatCompletion:
        messages: Any = [{"role": "user", "content": f"script:{server.name}"}]
        options: Any = {"include_usage": True}
        async with client.chat.completions.stream(model="m", messages=messages, stream_options=options) as stream:
            return await stream.get_final_completion()

    text = server.use(ask)
    assert text.choices[0].message.content == reply["content"]
    assert text.usage is not None
    assert text.usage.completion_tokens > 0
    called = server.use(ask).choices[0]
    assert called.finish_reason == "tool_calls"
    assert called.message.tool_calls is not None
    function: Any = called.message.tool_calls[0]
    assert json.loads(function.function.arguments) == {"text": "a fairly long text, in several pieces"}


def test_the_bench_script_calls_the_tools_in_turns_and_then_answers(server: Server) -> None:
    messages: list[Any] = [{"role": "user", "content": "bench:3:0"}]
    asked = []
    other = {"type": "function", "function": {**TOOL["function"], "name": "other"}}
    while (message := server.ask(messages=messages, tools=[TOOL, other]).choices[0].message).tool_calls:
        call: Any = message.tool_calls[0]
        asked.append((call.function.name, call.function.arguments))
        messages += [
            message.model_dump(include={"role", "content", "tool_calls"}),
            {"role": "tool", "tool_call_id": call.id, "content": "ok"},
        ]
    assert asked == [("echo", '{"text": "0"}'), ("other", '{"text": "1"}')]
    assert message.content == "done"


def test_in_bad_weather_a_share_of_the_answers_fails_and_all_are_counted(server: Server) -> None:
    question = {"model": "m", "messages": [{"role": "user", "content": QUESTION}]}

    def ask() -> int:
        return httpx.post(f"{server.root}/v1/chat/completions", json=question).status_code

    before = httpx.get(f"{server.root}/_asked").json()["asked"]
    weather = {"share": 0.5, "faults": ["status:429", "status:500"], "retry_after": "1", "seed": 7}
    try:
        httpx.put(f"{server.root}/_weather", json=weather).raise_for_status()
        first = [ask() for _ in range(20)]
        httpx.put(f"{server.root}/_weather", json=weather).raise_for_status()
        assert [ask() for _ in range(20)] == first
    finally:
        httpx.put(f"{server.root}/_weather", json={}).raise_for_status()
    assert set(first) == {200, 429, 500}
    assert ask() == 200
    assert httpx.get(f"{server.root}/_asked").json()["asked"] == before + 41
    assert httpx.put(f"{server.root}/_weather", json={"faults": ["hail"]}).status_code == 400


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages"),
        ([{"role": "nobody", "content": "x"}], "role"),
        ([{"role": "tool", "tool_call_id": "a", "content": "x"}], "must be a response"),
        (
            [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "echo", "arguments": "{}"}}],
                },
                {"role": "user", "content": "y"},
            ],
            "must be followed",
        ),
    ],
)
def test_what_openai_refuses_is_refused(server: Server, messages: list[Any], complaint: str) -> None:
    with pytest.raises(openai.BadRequestError, match=complaint):
        server.ask(messages=messages)


def test_a_malformed_script_is_refused(server: Server) -> None:
    answer = httpx.put(f"{server.root}/_scripts/{server.name}", json=[{"contents": "x"}])
    assert answer.status_code == 400
    assert "contents" in answer.json()["error"]["message"]


def test_models_and_health_answer_and_nothing_else_does(server: Server) -> None:
    assert httpx.get(f"{server.root}/health").status_code == 200
    assert httpx.get(f"{server.base_url}/models").json()["data"]
    assert httpx.get(f"{server.root}/").status_code == 404
    assert httpx.get(f"{server.base_url}/chat/completions").status_code == 404


def test_an_agent_it_does_not_know_gets_a_plain_answer(server: Server) -> None:
    content = server.ask(QUESTION, tools=[TOOL]).choices[0].message.content
    assert content is not None
    assert QUESTION in content
    assert "stand-in model" in content


def test_the_answer_fits_the_schema_that_is_demanded(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {
            "text": {"type": "string", "maxLength": 10},
            "mood": {"$ref": "#/$defs/Mood"},
            "score": {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}]},
            "sure": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        },
        "$defs": {"Mood": {"enum": ["good", "bad"], "type": "string"}},
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    content = server.ask(QUESTION, response_format=wanted).choices[0].message.content
    assert content is not None
    answer = json.loads(content)
    assert answer == {
        "text": answer["tags"][0][:10],
        "mood": "good",
        "score": 3,
        "sure": False,
        "tags": answer["tags"],
    }


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_and_with_0_whatever_is_still_under_way(signal_number: int) -> None:
    process, base_url = start()
    server = Server(base_url)
    server.script({"fault": "stall"}, {"content": "late", "delay_s": 30})

    async def interrupted(client: AsyncOpenAI) -> int:
        messages: Any = [{"role": "user", "content": f"script:{server.name}"}]
        asks = [asyncio.create_task(client.chat.completions.create(model="m", messages=messages)) for _ in range(2)]
        await asyncio.sleep(0.3)
        code = await asyncio.to_thread(stop, process, signal_number)
        for result in await asyncio.gather(*asks, return_exceptions=True):
            assert isinstance(result, openai.APIConnectionError)
        return code

    assert server.use(interrupted) == 0


def test_a_taken_port_is_one_clear_line(server: Server) -> None:
    port = server.root.rpartition(":")[2]
    command = [sys.executable, "-m", "app.devstack.model_server", "--port", port]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == [
        f"stand-in model server: cannot listen on port {port}: Address already in use"
    ]
