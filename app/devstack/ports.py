"""Loopback ports for the servers of a stack."""

import random
import socket

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A free loopback port below those that the system hands to outgoing connections.

    From among those, a client that keeps trying a server that is down would sooner or later be given the server's own
    port, connect to itself, and keep the server from coming back.
    """
    while True:
        port = random.randrange(15_000, 32_000)
        if is_free(port):
            return port


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Can a server be started on this port?"""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
