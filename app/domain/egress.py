"""Addresses that the service may ask: how a URL is read, what an allow-list allows, and what is on the public internet.

Nothing here looks a name up. What a name stands for is checked when a connection to it is made (`worker.egress`).
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import quote

from app.domain.errors import EgressRefused

MAX_URL_CHARS = 2_048
DEFAULT_PORTS = {"https": 443, "http": 80}

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<authority>[^/?#]+)(?P<rest>[^#]*)", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]+)(?::(?P<port>[0-9]{1,5}))?")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")
_FORBIDDEN = re.compile(r"[\s\\\x00-\x20\x7f-\x9f\ud800-\udfff]")
_NO_HOST = "The address has a host that is neither a name nor an IP address in its usual form."
_KEPT_IN_A_PATH = "/?%:@!$&'()*+,;=-._~[]"

_IPV4_NOT_PUBLIC = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # "this" host
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared by carriers; a cloud's metadata at 100.100.100.200
        "127.0.0.0/8",
        "168.63.129.16/32",  # looks public, and is the host of every virtual machine in Azure
        "169.254.0.0/16",  # link-local: the metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments; a cloud's metadata at 192.0.0.192
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
_IPV6_UNICAST = IPv6Network("2000::/3")
"""All that is assigned for the public internet. Outside of it: loopback, unique-local, link-local, site-local,
multicast, and the forms that hold an IPv4 address (mapped, compatible, NAT64)."""
_IPV6_NOT_PUBLIC = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: holds an IPv4 address
        "3ffe::/16",  # was a test network
        "3fff::/20",  # documentation
    )
)


def is_public(address: str) -> bool:
    """Is this IP address one of the public internet, of a single host? Not a matter of opinion of a Python version."""
    parsed = ip_address(address)
    if isinstance(parsed, IPv4Address):
        return not any(parsed in network for network in _IPV4_NOT_PUBLIC)
    return parsed in _IPV6_UNICAST and not any(parsed in network for network in _IPV6_NOT_PUBLIC)


@dataclass(frozen=True, slots=True)
class Target:
    """A URL as it is asked: everything in it has one spelling. `host` is a name, or an IP address without brackets.

    `path` begins with a slash and includes the query.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        """`https://example.com:443`: with its port in every case."""
        return f"{self.scheme}://{self._bracketed}:{self.port}"

    @property
    def url(self) -> str:
        port = "" if DEFAULT_PORTS[self.scheme] == self.port else f":{self.port}"
        return f"{self.scheme}://{self._bracketed}{port}{self.path}"

    @property
    def is_address(self) -> bool:
        """Is the host an IP address, not a name?"""
        return ":" in self.host or self.host.rpartition(".")[2].isdigit()

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def read_url(url: str) -> Target:
    """Read a URL strictly: what two programs might read differently is refused, not guessed.

    Raises `EgressRefused`.
    """
    if len(url) > MAX_URL_CHARS:
        raise EgressRefused(f"The address is longer than {MAX_URL_CHARS} characters.")
    if _FORBIDDEN.search(url):
        raise EgressRefused("The address holds a space, a control character or a backslash.")
    parts = _URL.match(url)
    if parts is None:
        raise EgressRefused("The address is not a URL such as https://example.com/path.")
    scheme = parts["scheme"].lower()
    if scheme not in DEFAULT_PORTS:
        raise EgressRefused("The address does not begin with https://.")
    if "@" in parts["authority"]:
        raise EgressRefused("The address holds a user name or a password.")
    host, port = _read_authority(parts["authority"], scheme)
    rest = parts["rest"] if parts["rest"].startswith("/") else f"/{parts['rest']}"
    return Target(scheme, host, port, quote(rest, safe=_KEPT_IN_A_PATH))


def check(target: Target, trusted: Collection[str] = ()) -> None:
    """What can be said of an address without looking its name up. `trusted`: origins that are exempt.

    Raises `EgressRefused` unless it is https, and not an IP address outside of the public internet.
    """
    if target.origin in trusted:
        return
    if target.scheme != "https":
        raise EgressRefused("Only https:// addresses may be asked.")
    if target.is_address and not is_public(target.host):
        raise EgressRefused(f"{target.host} is not an address of the public internet.")


@dataclass(frozen=True, slots=True)
class AllowedHost:
    """An entry of an allow-list: a host and its port; with `below`, every name below that host instead of itself."""

    host: str
    port: int
    below: bool

    def allows(self, target: Target) -> bool:
        if target.port != self.port:
            return False
        return target.host.endswith(f".{self.host}") if self.below else target.host == self.host


@lru_cache
def read_allowed(entry: str) -> AllowedHost:
    """`api.example.com`, `*.example.com` (every name below it), `wiki.internal:8080`; port 443 where none is written.

    Raises `ValueError` for anything else; also for `*` and `*.com`, which allow everything and nearly so.
    """
    below = entry.startswith("*.")
    try:
        host, port = _read_authority(entry.removeprefix("*."), "https")
    except EgressRefused as error:
        raise ValueError(f"{entry!r} is not a host such as api.example.com or *.example.com: {error}") from None
    allowed = AllowedHost(host, port, below)
    if below and ("." not in host or Target("https", host, port, "/").is_address):
        raise ValueError(f"{entry!r} allows too much: a name with a dot has to follow *.")
    return allowed


def check_allowed(target: Target, allow: Sequence[str]) -> None:
    """Raises `EgressRefused` where the allow-list has no such host and port, `ValueError` where it is malformed."""
    if not any(read_allowed(entry).allows(target) for entry in allow):
        raise EgressRefused(f"{target.host} at port {target.port} may not be asked. Allowed: {', '.join(allow)}.")


def read_origins(origins: Sequence[str]) -> frozenset[str]:
    """Origins as `Target.origin` spells them. Raises `EgressRefused` for what is not one."""
    return frozenset(read_url(origin).origin for origin in origins)


def _read_authority(authority: str, scheme: str) -> tuple[str, int]:
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise EgressRefused("The address has no host, or a malformed one.")
    port = int(parts["port"]) if parts["port"] else DEFAULT_PORTS[scheme]
    if not 1 <= port <= 65_535:
        raise EgressRefused("The address has an impossible port.")
    return _read_host(parts["host"]), port


def _read_host(text: str) -> str:
    """One spelling for each host. An IP address in any but its usual form is refused: programs disagree about those."""
    try:
        if text.startswith("["):
            address = IPv6Address(text[1:-1])
            if address.scope_id is not None:
                raise EgressRefused("The address names a network interface.")
            return str(address)
        # What Unicode has for letters, digits and dots becomes those: what is checked below is what will be asked.
        name = text if text.isascii() else text.encode("idna").decode("ascii")
        name = name.lower().removesuffix(".")
        if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", name.rpartition(".")[2]):
            return str(IPv4Address(name))
    except (AddressValueError, UnicodeError):
        raise EgressRefused(_NO_HOST) from None
    if not _NAME.fullmatch(name):
        raise EgressRefused(_NO_HOST)
    return name
