"""How receivers of traces are written in settings: an address, and the headers that every request to it carries."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_URL = re.compile(r"https?://[\x21-\x7e]+")
_OURS = frozenset({"connection", "content-encoding", "content-length", "content-type", "host", "transfer-encoding"})
"""Headers that say how a request is sent; nobody else may."""


@dataclass(frozen=True, slots=True)
class OtlpEndpoint:
    """Where OTLP traces are posted to. `headers`: names in lower case; their values are secrets."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def host(self) -> str:
        """With its port, where the address has one."""
        return urlsplit(self.url).netloc


def read_otlp_endpoints(text: str) -> tuple[OtlpEndpoint, ...]:
    """`URL name=value name=value; URL …`, values percent-encoded.

    Raises `ValueError`: which entry is wrong and why, without anything of a header's value.
    """
    entries = [entry.split() for entry in text.split(";") if entry.strip()]
    return tuple(_endpoint(number, *parts) for number, parts in enumerate(entries, 1))


def check_url(url: str) -> None:
    """Raises `ValueError` for what is no http address, or holds a user or password: those belong into settings that
    are secrets."""
    if not _URL.fullmatch(url):
        raise ValueError("must start with http:// or https://, and hold no space")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("must be an address, with a port between 0 and 65535") from None
    if not parts.hostname:
        raise ValueError("must be an address with a host")
    if "@" in parts.netloc:
        raise ValueError("must hold no user and no password")


def basic(user: str, password: str) -> str:
    """The credentials of HTTP's Basic scheme."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _endpoint(number: int, url: str, *assignments: str) -> OtlpEndpoint:
    where = f"address {number}"
    try:
        check_url(url)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
    parts = urlsplit(url)
    if parts.path in ("", "/"):
        raise ValueError(f"{where} must have the path of the receiver, usually /v1/traces")
    if parts.fragment:
        raise ValueError(f"{where} must have no fragment")
    headers: dict[str, str] = {}
    for position, assignment in enumerate(assignments, 1):
        its = f"header {position} of {where}"
        name, equals, value = assignment.partition("=")
        # Until it is known to be a name it may be a part of a value, so it is not shown.
        if not equals or not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{its} must be name=value, with %20 for a space in the value")
        if name.lower() in _OURS or name.lower() in headers:
            raise ValueError(f"{its} must be none that the service sets, and given once")
        headers[name.lower()] = unquote(value)
        if not _HEADER_VALUE.fullmatch(headers[name.lower()]):
            raise ValueError(f"{its} must have a value of visible ASCII characters")
    return OtlpEndpoint(url, headers)
