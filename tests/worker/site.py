"""Servers on loopback for outgoing requests: one answers as a test wants, byte by byte, one is reached by nobody."""

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.devstack.ports import LOOPBACK

Answer = bytes | Callable[[socket.socket], None]
"""What is sent for a path: bytes as they are, or whatever this does with the connection."""


def page(body: bytes, *headers: str, status: str = "200 OK", kind: str = "text/plain") -> bytes:
    """A whole answer."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", f"Content-Type: {kind}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return page(b"", f"Location: {location}", status=status)


class Site:
    """Answers each path as it is told, and keeps what it was asked. One request a connection."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[str] = []
        self.connections = 0
        self._tls = tls
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._ends = threading.Event()

    @property
    def address(self) -> str:
        return f"{'https' if self._tls else 'http'}://{LOOPBACK}:{self.port}"

    @property
    def host(self) -> str:
        """As an allow-list names it."""
        return f"{LOOPBACK}:{self.port}"

    def rest(self, seconds: float) -> None:
        """Be silent, unless the test is over."""
        self._ends.wait(seconds)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with suppress(OSError), ExitStack() as stack:
            connection = stack.enter_context(plain)
            connection.settimeout(20)
            if self._tls:
                connection = stack.enter_context(self._tls.wrap_socket(plain, server_side=True))
            head, _, body = _request(connection)
            self.requests.append(f"{head}\r\n\r\n{body}")
            answer = self.answers.get(head.split(" ")[1].partition("?")[0], page(b"", status="404 Not Found"))
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65_536):
                    pass


def _request(connection: socket.socket) -> tuple[str, str, str]:
    received = b""
    while b"\r\n\r\n" not in received:
        received += _some(connection)
    head, middle, body = received.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < (int(lengths[0]) if lengths else 0):
        body += _some(connection)
    return head.decode("latin-1"), middle.decode(), body.decode("latin-1")


def _some(connection: socket.socket) -> bytes:
    if chunk := connection.recv(65_536):
        return chunk
    raise ConnectionError("the client has left")


class Canary:
    """Listens on loopback, IPv4 and IPv6 at the same port, and counts: nobody may ever connect. It says nothing."""

    def __init__(self) -> None:
        first = socket.create_server((LOOPBACK, 0))
        self.port: int = first.getsockname()[1]
        second = socket.create_server(("::1", self.port), family=socket.AF_INET6)
        self._listeners = [first, second]
        self._accepted: list[socket.socket] = []

    @property
    def connections(self) -> int:
        """So far; none that has been made is missed."""
        for listener in self._listeners:
            listener.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    self._accepted.append(listener.accept()[0])
        return len(self._accepted)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in (*self._accepted, *self._listeners):
            each.close()


def authority(directory: Path, *names: str) -> tuple[ssl.SSLContext, Path]:
    """A server's certificate for these names or addresses, and the file of the authority that has signed it."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives = x509.SubjectAlternativeName([_general(each) for each in names])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "authority.pem").write_bytes(pem)
    (directory / "server.pem").write_bytes(secret + pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem")
    return context, directory / "authority.pem"


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
