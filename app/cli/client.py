"""The HTTP API as a person's client: with their own key, and every refusal as one line."""

import json
import os
import ssl
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import SplitResult, urlencode, urlsplit

import click

from app.cli.failure import fail
from app.cli.text import printable

KEY_VARIABLE = "AGENT_SERVICE_KEY"
_TIMEOUT_SECONDS = 30

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Client:
    """Asks the API at `url` in the name of `key`. Ends the command where the answer is a refusal, or there is none.

    Redirects are not followed: the key is for this address alone.
    """

    url: SplitResult
    key: str

    def get(self, path: str, **query: object) -> Any:
        given = {name: value for name, value in query.items() if value is not None}
        return self._ask("GET", f"{path}?{urlencode(given)}" if given else path)

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        return self._ask("POST", path, json.dumps(body))

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            with closing(self._connection()) as connection:
                connection.request(method, self.url.path.rstrip("/") + path, body, headers)
                response = connection.getresponse()
                content = response.read()
        except (OSError, HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            fail(f"the API at {self._address} does not answer: {printable(reason)}")
        return self._read(response, content)

    def _connection(self) -> HTTPConnection:
        host, port = self.url.hostname or "", self.url.port
        if self.url.scheme == "https":
            return HTTPSConnection(host, port, timeout=_TIMEOUT_SECONDS, context=ssl.create_default_context())
        return HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS)

    def _read(self, response: HTTPResponse, content: bytes) -> Any:
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if response.status >= 400 and isinstance(answer, dict) and "title" in answer:
            fail(_in_a_line(answer))
        if response.status != 200 or answer is None:
            fail(f"what answers at {self._address} is not this service's API (status {response.status})")
        return answer

    @property
    def _address(self) -> str:
        return f"{self.url.scheme}://{self.url.netloc}"


def _in_a_line(problem: Mapping[str, Any]) -> str:
    """A problem document: what it is, why, and which places of the request are wrong."""
    places = [f"{place.get('pointer')} {place.get('detail')}" for place in problem.get("errors") or ()]
    detail = problem.get("detail")
    return printable("; ".join([f"{problem['title']}: {detail}" if detail else problem["title"], *places]))


class Address(click.ParamType[SplitResult]):
    """Where an HTTP API is."""

    name = "url"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> SplitResult:
        text = str(value)
        try:
            address = urlsplit(text)
            is_one = address.scheme in ("http", "https") and bool(address.hostname) and (address.port or 1) > 0
        except ValueError:
            is_one = False
        if not is_one or not text.isascii() or not text.isprintable() or any(mark in text for mark in " ?#@"):
            self.fail(f"{text!r} is not an address like https://agents.example.com.", param, ctx)
        return address


def api_options(command: Callable[P, T]) -> Callable[P, T]:
    """The options that `connect` needs: `url` and `key_file`."""
    url = click.option(
        "--url",
        type=Address(),
        envvar="AGENT_SERVICE_URL",
        default=lambda: f"http://127.0.0.1:{os.environ.get('API_PORT') or 8000}",
        show_default="http://127.0.0.1:$API_PORT",
        show_envvar=True,
        help="Where the API is.",
    )
    key_file = click.option(
        "--key-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help=f"A file that holds your API key; without it, the variable {KEY_VARIABLE} does.",
    )
    return url(key_file(command))


def connect(url: SplitResult, key_file: Path | None) -> Client:
    """A client in the name of whoever's key the file holds, or the environment.

    The key is no option itself: what a command is given, every user of the machine can see.
    """
    try:
        key = (key_file.read_text(encoding="utf-8") if key_file else os.environ.get(KEY_VARIABLE, "")).strip()
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"cannot be read: {error}", param_hint="--key-file") from None
    if not key:
        raise click.UsageError(f"Whose decision is it? Set {KEY_VARIABLE} to your API key, or name a file: --key-file.")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise click.UsageError(f"{key_file or KEY_VARIABLE} does not hold an API key.")
    return Client(url, key)
