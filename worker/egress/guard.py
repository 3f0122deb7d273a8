"""What stands between a name and a connection: where it leads is looked at when the connection is made, not before."""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from aiohttp import AddrInfoType
from aiohttp.abc import AbstractResolver, ResolveResult

from app.domain.egress import is_public

LOOKUPS_AT_A_TIME = 8


class NotPublic(OSError):
    """The address that was about to be connected to is not one of the public internet."""


def public_socket(destination: AddrInfoType) -> socket.socket:
    """A socket for exactly this address, which has been resolved and will not be again.

    aiohttp asks for one before each connection, whether the host was a name or an IP address, so there is no second
    look-up that could say something else, and no spelling of an address that comes by another way.
    Raises `NotPublic`.
    """
    family, kind, protocol, _, address = destination
    if not is_public(str(address[0])):
        raise NotPublic("not an address of the public internet")
    return socket.socket(family, kind, protocol)


class Resolver(AbstractResolver):
    """The system's resolver, in threads of its own.

    A name server that keeps silent holds a thread for seconds, and whoever owns a name decides how his name server
    answers: the threads in which the rest of the process looks up Postgres or the model provider are not for that.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOKUPS_AT_A_TIME, thread_name_prefix="lookup")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        look_up = partial(socket.getaddrinfo, host, port, family=family, type=socket.SOCK_STREAM)
        found = await loop.run_in_executor(self._threads, look_up)
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=kind,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for kind, _, _, _, address in found
            if kind in (socket.AF_INET, socket.AF_INET6)
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
