"""Attempts to make the service ask what it should not, and what becomes of each: one table, run by `test_egress`.

In each of them the agent's allow-list allows as much as it can: the host itself, where it is one at all. What stops the
attempt is what stands in its last column. `{port}` is the port of a server on loopback that must never be reached.
"""

# ruff: noqa: RUF001 - characters that look like others are what some of these are about

from collections.abc import Sequence
from dataclasses import dataclass, field

UNREACHABLE = "2e00::1"
"""Public by its number, and assigned to nobody."""

NOT_PUBLIC = "is not an address of the public internet"
NO_ANSWER = "gave no answer"
"""The same as for a name that does not exist, so that nobody finds out which names there are inside."""
NO_HTTPS = "Only https:// addresses may be asked"
NO_WEB = "The address does not begin with https://"
NO_URL = "The address is not a URL"
NO_HOST = "a host that is neither a name nor an IP address in its usual form"
MALFORMED = "The address has no host, or a malformed one"
USERINFO = "The address holds a user name or a password"
CONTROL = "The address holds a space, a control character or a backslash"
INTERFACE = "The address names a network interface"
PORT = "The address has an impossible port"
NOT_ALLOWED = "may not be asked. Allowed:"
BAD_REDIRECT = "A redirect to a malformed address"
CIRCLES = "More than 5 redirects"


@dataclass(frozen=True)
class Attempt:
    """`url`: what is asked for. `how`: the trick. `answer`: what the model is told.

    `allow`: what the agent allows. `names`: what the name server says, at each look-up the next of its lists.
    `via`: the allowed and trusted server on which the attempt begins, as a redirect to `url`.
    """

    url: str
    how: str
    answer: str
    allow: Sequence[str] = ()
    names: dict[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    via: bool = False


def _literal(url: str, how: str, allow: str) -> Attempt:
    return Attempt(url, how, NOT_PUBLIC, (f"{allow}:{{port}}",))


def _name(name: str, how: str, *looked_up: Sequence[str]) -> Attempt:
    return Attempt(f"https://{name}:{{port}}/", how, NO_ANSWER, (f"{name}:{{port}}",), {name: looked_up})


def _redirect(url: str, how: str, answer: str, *allow: str) -> Attempt:
    return Attempt(url, f"a redirect to {how}", answer, allow, {"inside.example": [["127.0.0.1"]]}, via=True)


ATTEMPTS: list[Attempt] = [
    # -- addresses as they are
    _literal("https://127.0.0.1:{port}/", "loopback", "127.0.0.1"),
    _literal("https://127.255.255.254:{port}/", "loopback, another of its addresses", "127.255.255.254"),
    _literal("https://0.0.0.0:{port}/", "this host", "0.0.0.0"),
    _literal("https://[::]:{port}/", "this host, IPv6", "[::]"),
    _literal("https://[::1]:{port}/", "loopback, IPv6", "[::1]"),
    _literal("https://[0:0:0:0:0:0:0:1]:{port}/", "loopback, IPv6, written out", "[::1]"),
    _literal("https://10.0.0.1:{port}/", "a private network", "10.0.0.1"),
    _literal("https://172.31.255.1:{port}/", "a private network", "172.31.255.1"),
    _literal("https://192.168.1.1:{port}/", "a private network", "192.168.1.1"),
    _literal("https://100.100.100.200:{port}/", "metadata of a cloud, in the addresses of carriers", "100.100.100.200"),
    _literal("https://169.254.169.254:{port}/latest/meta-data/", "metadata of most clouds", "169.254.169.254"),
    _literal("https://192.0.0.192:{port}/", "metadata of a cloud, in the addresses of protocols", "192.0.0.192"),
    _literal("https://168.63.129.16:{port}/", "the host of virtual machines in a cloud", "168.63.129.16"),
    _literal("https://198.18.0.1:{port}/", "benchmarking", "198.18.0.1"),
    _literal("https://203.0.113.1:{port}/", "documentation", "203.0.113.1"),
    _literal("https://224.0.0.1:{port}/", "multicast", "224.0.0.1"),
    _literal("https://255.255.255.255:{port}/", "broadcast", "255.255.255.255"),
    _literal("https://[fd00:ec2::254]:{port}/", "metadata of a cloud, unique-local", "[fd00:ec2::254]"),
    _literal("https://[fe80::1]:{port}/", "link-local, IPv6", "[fe80::1]"),
    _literal("https://[fec0::1]:{port}/", "site-local", "[fec0::1]"),
    _literal("https://[ff02::1]:{port}/", "multicast, IPv6", "[ff02::1]"),
    _literal("https://[2001:db8::1]:{port}/", "documentation, IPv6", "[2001:db8::1]"),
    # -- an IPv4 address in an IPv6 one
    _literal("https://[::ffff:127.0.0.1]:{port}/", "IPv4-mapped", "[::ffff:127.0.0.1]"),
    _literal("https://[::ffff:7f00:1]:{port}/", "IPv4-mapped, in hexadecimal", "[::ffff:127.0.0.1]"),
    _literal("https://[::127.0.0.1]:{port}/", "IPv4-compatible", "[::127.0.0.1]"),
    _literal("https://[2002:7f00:1::]:{port}/", "6to4", "[2002:7f00:1::]"),
    _literal("https://[64:ff9b::7f00:1]:{port}/", "NAT64", "[64:ff9b::7f00:1]"),
    _literal("https://[64:ff9b:1::a00:1]:{port}/", "NAT64 of a network's own", "[64:ff9b:1::a00:1]"),
    _literal("https://[2001:0:7f00:1::80ff:fffe]:{port}/", "Teredo", "[2001:0:7f00:1::80ff:fffe]"),
    # -- other spellings of an address: what is not its usual form is not one
    Attempt("https://2130706433:{port}/", "127.0.0.1 as a decimal number", NO_HOST),
    Attempt("https://0177.0.0.1:{port}/", "127.0.0.1 in octal", NO_HOST),
    Attempt("https://0x7f000001:{port}/", "127.0.0.1 as a hexadecimal number", NO_HOST),
    Attempt("https://0x7f.0.0.0x1:{port}/", "127.0.0.1 in hexadecimal", NO_HOST),
    Attempt("https://127.1:{port}/", "127.0.0.1, short", NO_HOST),
    Attempt("https://127.0.1:{port}/", "127.0.0.1, less short", NO_HOST),
    Attempt("https://0:{port}/", "0.0.0.0, short", NO_HOST),
    Attempt("https://127.0.0.1.1:{port}/", "one number too many", NO_HOST),
    Attempt("https://256.0.0.1:{port}/", "a number too large", NO_HOST),
    _literal("https://127.0.0.1.:{port}/", "a dot at the end of an address", "127.0.0.1"),
    _literal("https://１２７.０.０.１:{port}/", "full-width digits", "127.0.0.1"),
    _literal("https://127。0。0。1:{port}/", "ideographic full stops", "127.0.0.1"),
    _literal("https://①②⑦.⓪.⓪.①:{port}/", "digits in circles", "127.0.0.1"),
    Attempt("https://%31%32%37.0.0.1:{port}/", "a percent-encoded host", NO_HOST),
    Attempt("https://127.0.0.1%00.example.com:{port}/", "an encoded NUL in the host", NO_HOST),
    Attempt("https://[::1%25lo]:{port}/", "a zone, encoded", INTERFACE),
    Attempt("https://[fe80::1%eth0]:{port}/", "a zone", INTERFACE),
    Attempt("https://[127.0.0.1]:{port}/", "IPv4 in brackets", NO_HOST),
    Attempt("https://[::1:{port}/", "half a bracket", MALFORMED),
    Attempt("https://::1:{port}/", "IPv6 without brackets", MALFORMED),
    # -- names that lead inside
    _name("localhost", "a name of loopback", ["127.0.0.1", "::1"]),
    _name("localhost.localdomain", "another one", ["127.0.0.1"]),
    _name("metadata.google.internal", "metadata of a cloud by its name", ["169.254.169.254"]),
    _name("127.0.0.1.nip.example", "a public name for any address", ["127.0.0.1"]),
    _name("mapped.example", "a name of an IPv4-mapped address", ["::ffff:127.0.0.1"]),
    _name("nat64.example", "a name of a NAT64 address", ["64:ff9b::7f00:1"]),
    _name("zone.example", "a name of a link-local address with its zone", ["fe80::1%lo"]),
    _name("intranet", "a name without a dot", ["10.1.2.3"]),
    _name("all-inside.example", "a name of several private addresses", ["10.0.0.1", "127.0.0.1", "::1"]),
    _name("half-inside.example", "a name of a public address and a private one", [UNREACHABLE, "127.0.0.1"]),
    _name("inside-first.example", "the same, the private one first", ["127.0.0.1", UNREACHABLE]),
    _name("rebinding.example", "rebinding: public when it is first looked up", [UNREACHABLE], ["127.0.0.1"]),
    Attempt(
        "https://LOCALHOST.:{port}/",
        "capitals, and a dot at the end",
        NO_ANSWER,
        ("localhost:{port}",),
        {"localhost": [["127.0.0.1"]]},
    ),
    # -- two readings of one URL
    Attempt("https://docs.example.com@127.0.0.1:{port}/", "an allowed host as the user name", USERINFO),
    Attempt("https://docs.example.com:443@127.0.0.1:{port}/", "the same, with a password", USERINFO),
    Attempt("https://127.0.0.1:{port}#@docs.example.com/", "an allowed host in the fragment", NOT_ALLOWED),
    Attempt("https://127.0.0.1:{port}?@docs.example.com/", "an allowed host in the query", NOT_ALLOWED),
    Attempt("https://127.0.0.1:{port}\\@docs.example.com/", "a backslash", CONTROL),
    Attempt("https:\\\\127.0.0.1:{port}/", "backslashes in place of slashes", CONTROL),
    Attempt("https://docs.example.com\t.evil.example/", "a tab in the host", CONTROL),
    Attempt("https://docs.example.com/\r\nHost: 127.0.0.1", "a line break, and a header", CONTROL),
    Attempt(" https://127.0.0.1:{port}/", "a space before it", CONTROL),
    Attempt("https:127.0.0.1:{port}/", "no slashes", NO_URL),
    Attempt("//127.0.0.1:{port}/", "no scheme", NO_URL),
    Attempt("https:///127.0.0.1:{port}/", "three slashes", NO_URL),
    Attempt("https://docs.example.com:{port}:443/", "two ports", MALFORMED),
    Attempt("https://docs.example.com:0/", "port 0", PORT),
    Attempt("https://docs.example.com:65979/", "port 443, after an overflow", PORT),
    Attempt("https://docs.example.com℀.example/", "a character that turns into a/c", NO_HOST),
    # -- hosts and ports that are not allowed
    Attempt("https://evil.example/", "another host", NOT_ALLOWED),
    Attempt("https://docs.example.com.evil.example/", "an allowed host as the beginning of another", NOT_ALLOWED),
    Attempt("https://evildocs.example.com/", "an allowed host as the end of another", NOT_ALLOWED),
    Attempt("https://dоcs.example.com/", "a Cyrillic letter", NOT_ALLOWED),
    Attempt("https://docs.example.com:{port}/", "another port of an allowed host", NOT_ALLOWED),
    Attempt("https://example.org/", "the host above those that are allowed", NOT_ALLOWED, ("*.example.org",)),
    # -- other schemes
    Attempt("http://docs.example.com:443/", "http", NO_HTTPS),
    Attempt("http://169.254.169.254/latest/meta-data/", "http, metadata", NO_HTTPS, ("169.254.169.254:80",)),
    Attempt("ftp://docs.example.com/", "ftp", NO_WEB),
    Attempt("file://localhost/etc/passwd", "a file", NO_WEB),
    Attempt("file:///etc/passwd", "a file, without a host", NO_URL),
    Attempt("gopher://127.0.0.1:{port}/_INFO", "gopher", NO_WEB),
    Attempt("ws://127.0.0.1:{port}/", "a web socket", NO_WEB),
    Attempt("data:text/plain,hello", "data in the URL", NO_URL),
    Attempt("javascript://docs.example.com/%0aalert(1)", "javascript", NO_WEB),
    Attempt("unix:///var/run/docker.sock", "a socket of this machine", NO_URL),
    # -- redirects of an allowed server: each hop is checked like the first
    _redirect("https://127.0.0.1:{port}/", "loopback", NOT_PUBLIC, "127.0.0.1:{port}"),
    _redirect("//127.0.0.1:{port}/", "loopback, in the scheme that it had", NO_HTTPS, "127.0.0.1:{port}"),
    _redirect("https://[::ffff:127.0.0.1]:{port}/", "an IPv4-mapped address", NOT_PUBLIC, "[::ffff:7f00:1]:{port}"),
    _redirect("https://2130706433:{port}/", "a decimal number", NO_HOST),
    _redirect("https://169.254.169.254/", "metadata", NOT_PUBLIC, "169.254.169.254"),
    _redirect("https://inside.example:{port}/", "a name that leads inside", NO_ANSWER, "inside.example:{port}"),
    _redirect("https://evil.example/", "a host that is not allowed", NOT_ALLOWED),
    _redirect("http://docs.example.com/", "http", NO_HTTPS, "docs.example.com:80"),
    _redirect("file:///etc/passwd", "a file", NO_URL),
    _redirect("gopher://127.0.0.1:{port}/", "another scheme", NO_WEB),
    _redirect("javascript:alert(1)", "javascript", NO_URL),
    _redirect("https://docs.example.com@127.0.0.1:{port}/", "an address with a user name", USERINFO),
    _redirect("https:\\\\127.0.0.1:{port}/", "an address with backslashes", BAD_REDIRECT),
    _redirect("https://127.0.0.1:{port}/\tx", "an address with a tab", BAD_REDIRECT, "127.0.0.1:{port}"),
    _redirect("/again", "where it came from, for ever", CIRCLES),
]
