"""The stand-in model server: OpenAI's chat completions over loopback HTTP, without a model behind them.

    POST /v1/chat/completions    answered by a script, the bench script or the brain, whichever the request names
    PUT  /_scripts/{name}        register a script: a JSON list of `wire.Reply`
    GET  /_scripts/{name}        {"requests": [bodies seen, in order]}
    PUT  /_weather               a `Weather`: of the answers, this share fails, in one of these ways
    GET  /_asked                 {"asked": how many completions were asked for}
    GET  /v1/models, /health

No framework, because it shares its cores with what a benchmark measures.
"""

import os
import random
import sys

import click
from pydantic import BaseModel, Field, ValidationError

from app.devstack import brain
from app.devstack.loopback import EVENT_STREAM, JSON, LOOPBACK, ClientLeft, Exchange, Receive, Scope, Send, serve
from app.devstack.model_scripts import REPLIES, ScriptError, Scripts
from app.devstack.wire import ChatRequest, Completion, Fault, Reply, error_body, problem_of

THINKING_SECONDS = 0.2
DRIP_SECONDS = 0.05
"""Between two bytes of a `slow_drip`."""
_SCRIPTS = "/_scripts/"
_MODELS = b'{"object":"list","data":[{"id":"stand-in","object":"model","created":0,"owned_by":"agent-service"}]}'


class Weather(BaseModel, extra="forbid"):
    """How the provider does today. `seed` makes the choice repeatable."""

    share: float = Field(0, ge=0, le=1)
    faults: list[Fault] = []
    retry_after: str | None = None
    seed: int | None = None


class ModelServer:
    """The ASGI application. `thinking_s`: seconds that the brain takes for a reply, give or take a third."""

    def __init__(self, *, thinking_s: float) -> None:
        self._thinking_s = thinking_s
        self._scripts = Scripts()
        self._weather = Weather()
        self._dice = random.Random()
        self._asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            await self._route(exchange)
        except ClientLeft:
            return

    async def _route(self, exchange: Exchange) -> None:
        match exchange.method, exchange.path:
            case "POST", "/v1/chat/completions":
                await self._complete(exchange)
            case "PUT", path if path.startswith(_SCRIPTS):
                await self._register(exchange, path.removeprefix(_SCRIPTS))
            case "GET", path if path.startswith(_SCRIPTS):
                await self._show(exchange, path.removeprefix(_SCRIPTS))
            case "PUT", "/_weather":
                await self._change_weather(exchange)
            case "GET", "/_asked":
                await exchange.answer(200, b'{"asked":%d}' % self._asked)
            case "GET", "/v1/models":
                await exchange.answer(200, _MODELS)
            case "GET", "/health":
                await exchange.answer(200, b'{"status":"ok"}')
            case method, path:
                await _refuse(exchange, 404, f"Unknown request URL: {method} {path}.")

    async def _complete(self, exchange: Exchange) -> None:
        self._asked += 1
        body = await exchange.body()
        try:
            request = ChatRequest.model_validate_json(body)
        except ValidationError as error:
            return await _refuse(exchange, 400, _explain(error))
        if problem := problem_of(request.messages):
            return await _refuse(exchange, 400, f"Invalid parameter: {problem}.")
        try:
            reply = self._scripts.answer(request, body) or self._think(request)
        except ScriptError as error:
            return await _refuse(exchange, 400, str(error))
        if self._weather.faults and self._dice.random() < self._weather.share:
            fault = {"fault": self._dice.choice(self._weather.faults), "retry_after": self._weather.retry_after}
            reply = reply.model_copy(update=fault)

        if reply.delay_s:
            await exchange.pause(reply.delay_s)
        completion = Completion(request, reply, request_bytes=len(body))
        if reply.fault is not None:
            return await _fail(exchange, reply.fault, completion, retry_after=reply.retry_after)
        if request.stream:
            return await exchange.stream(completion.events())
        return await exchange.answer(200, completion.encode())

    def _think(self, request: ChatRequest) -> Reply:
        delay_s = self._thinking_s * random.uniform(2 / 3, 4 / 3)
        return brain.think(request).model_copy(update={"delay_s": delay_s})

    async def _register(self, exchange: Exchange, name: str) -> None:
        try:
            replies = REPLIES.validate_json(await exchange.body())
        except ValidationError as error:
            return await _refuse(exchange, 400, _explain(error))
        self._scripts.register(name, replies)
        return await exchange.answer(200, b"{}")

    async def _change_weather(self, exchange: Exchange) -> None:
        try:
            self._weather = Weather.model_validate_json(await exchange.body())
        except ValidationError as error:
            return await _refuse(exchange, 400, _explain(error))
        self._dice = random.Random(self._weather.seed)
        return await exchange.answer(200, b"{}")

    async def _show(self, exchange: Exchange, name: str) -> None:
        script = self._scripts.get(name)
        if script is None:
            return await _refuse(exchange, 404, f"script {name} is unknown")
        return await exchange.answer(200, b'{"requests":[' + b",".join(script.seen) + b"]}")


def create_model_server(*, thinking_s: float = THINKING_SECONDS) -> ModelServer:
    return ModelServer(thinking_s=thinking_s)


async def _fail(exchange: Exchange, fault: str, completion: Completion, *, retry_after: str | None) -> None:
    """Behave like a provider, or a network, on a bad day. Streams break like whole replies do."""
    if fault.startswith("status:"):
        status = int(fault.removeprefix("status:"))
        return await exchange.answer(status, error_body(status, f"scripted {status}"), retry_after=retry_after)
    if fault == "stall":
        return await exchange.pause(None)
    if fault == "disconnect":
        return await exchange.hang_up()

    body = b"".join(completion.events()) if completion.is_stream else completion.encode()
    if fault == "bad_json":
        body = body.replace(b"{", b"{{")
    await exchange.start(200, EVENT_STREAM if completion.is_stream else JSON, length=len(body))
    if fault == "truncated":
        await exchange.write(body[: len(body) // 2])
        return await exchange.hang_up()
    if fault == "slow_drip":
        for position in range(len(body)):
            await exchange.write(body[position : position + 1])
            await exchange.pause(DRIP_SECONDS)
        return await exchange.end()
    return await exchange.end(body)


async def _refuse(exchange: Exchange, status: int, message: str) -> None:
    await exchange.answer(status, error_body(status, message))


def _explain(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'body'}: {problem['msg']}"


@click.command()
@click.option("--port", default=0, show_default="a free one", help="Port.")
@click.option("--host", default=LOOPBACK, show_default=True, help="Address to bind.")
@click.option(
    "--thinking-s",
    default=THINKING_SECONDS,
    show_default=True,
    envvar="STAND_IN_THINKING_S",
    help="Seconds for a reply that is not scripted, give or take a third.",
)
def main(port: int, host: str, thinking_s: float) -> None:
    """Run the stand-in model server until SIGTERM or Ctrl-C."""
    try:
        serve(
            create_model_server(thinking_s=thinking_s),
            port,
            host=host,
            ready=lambda address: print(f"stand-in model server: {address}/v1", flush=True),
        )
    except OSError as error:
        sys.exit(f"stand-in model server: cannot listen on port {port}: {os.strerror(error.errno or 0)}")


if __name__ == "__main__":
    main()
