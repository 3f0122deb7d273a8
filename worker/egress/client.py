"""The HTTP client of tools and webhooks."""

import asyncio
import logging
import re
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Self
from urllib.parse import urljoin

from aiohttp import (
    ClientConnectorCertificateError,
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
    hdrs,
)
from yarl import URL

from app.domain.egress import Target, check, check_allowed, read_origins, read_url
from app.domain.errors import EgressRefused, ToolError
from app.domain.tool import HttpReply
from worker.egress.body import read_beginning, read_body
from worker.egress.guard import NotPublic, Resolver, public_socket

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 5
CONNECTIONS_AT_A_TIME = 100
"""Of either kind: a process has only so many files. What is more waits, within its time."""
_REDIRECTS = (301, 302, 303, 307, 308)
_UNTIMED = ClientTimeout(total=None, sock_connect=None)
"""The time of a whole call is bounded here, over all redirects; each part of it can take no longer than that."""
_NOT_OF_A_HEADER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_NOT_OF_A_URL = re.compile(r"[\x00-\x20\x7f\\]")


class Egress:
    """One for the process. `trusted`: origins that may be reached although they are private or not https.

    Those have a session of their own, without the guard; everything else cannot even share a connection with them.
    """

    def __init__(self, trusted: Sequence[str] = ()) -> None:
        self._trusted = read_origins(trusted)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        authorities = ssl.create_default_context()
        resolver = Resolver()
        self._stack.push_async_callback(resolver.close)
        connector = partial(
            TCPConnector, ssl=authorities, resolver=resolver, use_dns_cache=False, limit=CONNECTIONS_AT_A_TIME
        )
        guarded, unguarded = connector(socket_factory=public_socket), connector()
        self._guarded = await self._stack.enter_async_context(_session(guarded))
        self._unguarded = await self._stack.enter_async_context(_session(unguarded))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def get(
        self,
        url: str,
        *,
        allow: Sequence[str],
        headers: Mapping[str, str] | None = None,
        max_bytes: int = 1_000_000,
        timeout_s: float = 20.0,
    ) -> HttpReply:
        """GET, following at most five redirects, each of them checked like the first address. See `Http.get`.

        `headers` go to the origin of `url` alone: any of them may be a credential.
        Raises `EgressRefused`, and `ToolError` where the other server does not answer.
        """
        target = read_url(url)
        sent = dict(headers or {})
        async with _in_time(timeout_s, target):
            for _ in range(MAX_REDIRECTS + 1):
                check_allowed(target, allow)
                async with self._asked("GET", target, headers=sent) as response:
                    location = response.headers.get(hdrs.LOCATION)
                    if response.status not in _REDIRECTS or location is None:
                        return _reply(target, response, await read_body(response, max_bytes=max_bytes))
                came_from, target = target, _redirected(target, location)
                if target.origin != came_from.origin:
                    sent = {}
        raise EgressRefused(f"More than {MAX_REDIRECTS} redirects.")

    async def post(
        self, url: str, body: bytes, *, headers: Mapping[str, str], timeout_s: float, max_bytes: int = 1_024
    ) -> HttpReply:
        """POST to an address that its owner chose: there is no allow-list. A redirect is an answer.

        `max_bytes`: of the answer's body, which is cut there.
        Raises `EgressRefused`, and `ToolError` where the other server does not answer.
        """
        target = read_url(url)
        async with _in_time(timeout_s, target), self._asked("POST", target, headers=headers, body=body) as response:
            return _reply(target, response, await read_beginning(response, max_bytes=max_bytes))

    @asynccontextmanager
    async def _asked(
        self, method: str, target: Target, *, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[ClientResponse]:
        """The answer to one request, and what its failures mean. What is told is the same for a name that does not
        exist, one that leads to a private address and one that nobody answers at: else a model, or whoever registers
        webhooks, could find out by names what there is in the service's network."""
        check(target, self._trusted)
        if any(_NOT_OF_A_HEADER.search(f"{name}{value}") for name, value in headers.items()):
            raise EgressRefused("A header holds a control character.")
        session = self._unguarded if target.origin in self._trusted else self._guarded
        try:
            async with session.request(
                method, URL(target.url, encoded=True), headers=headers, data=body, allow_redirects=False
            ) as response:
                yield response
        except ClientConnectorCertificateError:
            raise EgressRefused(f"{target.host} has no valid certificate.") from None
        except ClientConnectorError as error:
            if isinstance(error.os_error, NotPublic):
                logger.warning("egress refused: not a public address", extra={"fields": {"host": target.host}})
                raise EgressRefused(_no_answer(target)) from error.os_error
            raise ToolError(_no_answer(target)) from error
        except ClientError as error:
            raise ToolError(_no_answer(target)) from error


def _session(connector: TCPConnector) -> ClientSession:
    """Nothing of the environment: no proxy, no `.netrc`. No cookies, and nothing decompressed before it is counted."""
    return ClientSession(
        connector=connector,
        cookie_jar=DummyCookieJar(),
        headers={hdrs.USER_AGENT: "agent-service", hdrs.ACCEPT_ENCODING: "identity"},
        timeout=_UNTIMED,
        auto_decompress=False,
        trust_env=False,
    )


@asynccontextmanager
async def _in_time(seconds: float, target: Target) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ToolError(_no_answer(target)) from None


def _redirected(target: Target, location: str) -> Target:
    if _NOT_OF_A_URL.search(location):  # joining would drop some of these, and so hide what was meant
        raise EgressRefused("A redirect to a malformed address.")
    return read_url(urljoin(target.url, location))


def _reply(target: Target, response: ClientResponse, body: bytes) -> HttpReply:
    return HttpReply(
        status=response.status,
        url=target.url,
        content_type=response.headers.get(hdrs.CONTENT_TYPE, ""),
        body=body,
        retry_after=response.headers.get(hdrs.RETRY_AFTER, ""),
    )


def _no_answer(target: Target) -> str:
    return f"{target.host} gave no answer."
