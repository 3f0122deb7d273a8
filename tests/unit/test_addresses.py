"""How URLs, allow-lists and addresses are read."""

import re

import pytest

from app.domain.egress import Target, check, check_allowed, is_public, read_allowed, read_origins, read_url
from app.domain.errors import EgressRefused


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.1",
        "168.63.129.15",
        "168.63.129.17",
        "169.253.255.255",
        "172.15.255.255",
        "172.32.0.0",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2001:200::1",
        "2606:4700:4700::1111",
        "2a00:1450::1",
        "3ffd:ffff::1",
    ],
)
def test_a_public_address_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.255.255.255",
        "10.0.0.0",
        "10.255.255.255",
        "100.64.0.0",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.255",
        "168.63.129.16",
        "169.254.0.0",
        "169.254.255.255",
        "172.16.0.0",
        "172.31.255.255",
        "192.0.0.0",
        "192.0.0.255",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.0.0",
        "192.168.255.255",
        "198.18.0.0",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.0",
        "239.255.255.255",
        "240.0.0.0",
        "255.255.255.255",
        "::",
        "::1",
        "::1.1.1.1",
        "::ffff:1.1.1.1",
        "64:ff9b::1.1.1.1",
        "64:ff9b:1::1",
        "100::1",
        "1fff:ffff::1",
        "2001::1",
        "2001:1ff:ffff::1",
        "2001:db8::1",
        "2002:101:101::1",
        "3ffe::1",
        "3fff::1",
        "3fff:fff:ffff::1",
        "4000::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_an_address_that_is_not_of_the_public_internet_is_not(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://EXAMPLE.com.:443/a", "https://example.com/a"),
        ("https://example.com?a=b", "https://example.com/?a=b"),
        ("https://example.com#a", "https://example.com/"),
        ("https://example.com/a?b=c#d", "https://example.com/a?b=c"),
        ("https://example.com:8443/", "https://example.com:8443/"),
        ("http://example.com:80/", "http://example.com/"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/"),
        ("https://example.com/ä?q=ö", "https://example.com/%C3%A4?q=%C3%B6"),
        ("https://example.com/%C3%A4/a%2Fb", "https://example.com/%C3%A4/a%2Fb"),
        ("https://example.com/a|b<c>", "https://example.com/a%7Cb%3Cc%3E"),
        ("https://example.com/../a/./b//c", "https://example.com/../a/./b//c"),
        ("https://a_b.example.com/", "https://a_b.example.com/"),
        ("https://[2606:4700:0:0::1111]:8443/", "https://[2606:4700::1111]:8443/"),
        ("https://1.1.1.1/", "https://1.1.1.1/"),
    ],
)
def test_a_url_has_one_spelling(url: str, read: str) -> None:
    assert read_url(url).url == read
    assert read_url(read).url == read


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "https://",
        "https:///a",
        "https://.",
        "https://a..b/",
        "https://.a/",
        "https://-a.b/",
        "https://a-.b/",
        f"https://{'a' * 64}.b/",
        f"https://{'a.' * 127}b/",
        "https://a.b:/",
        "https://a.b:٤٤٣/",
        "https://a.b:123456/",
        "https://a!b/",
        "https://a,b/",
        "https://[::1]a/",
        "https://a.0x/",
        "https://a\u3000b/",
        "https://a.b/\ud800",
        "https://a.b/\x9f",
        "https://a.b/" + "x" * 2_048,
    ],
)
def test_what_is_not_a_url_is_refused(url: str) -> None:
    with pytest.raises(EgressRefused):
        read_url(url)


def allows(entry: str, url: str) -> bool:
    return read_allowed(entry).allows(read_url(url))


def test_an_entry_of_an_allow_list_allows_one_host_and_one_port() -> None:
    assert allows("api.example.com", "https://api.example.com/a")
    assert allows("API.example.com.", "https://api.example.com:443/")
    assert allows("bücher.example", "https://xn--bcher-kva.example/")
    assert allows("api.example.com:8443", "https://api.example.com:8443/")
    assert not allows("api.example.com:8443", "https://api.example.com/")
    assert not allows("api.example.com", "https://api.example.com:8443/")
    assert not allows("api.example.com", "https://www.api.example.com/")
    assert not allows("api.example.com", "https://example.com/")
    assert allows("[::1]:8080", "http://[0::1]:8080/")


def test_an_entry_with_a_star_allows_every_name_below() -> None:
    assert allows("*.example.com", "https://a.example.com/")
    assert allows("*.example.com", "https://a.b.example.com/")
    assert allows("*.example.com:8443", "https://a.example.com:8443/")
    assert not allows("*.example.com", "https://example.com/")
    assert not allows("*.example.com", "https://notexample.com/")
    assert not allows("*.example.com", "https://a.example.com:8443/")
    assert not allows("*.example.com", "https://example.com.evil.example/")


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "*.",
        "*.com",
        "a.*.com",
        "*a.com",
        "*.10.0.0.1",
        "https://a.b",
        "a.b/c",
        "u@a.b",
        "a b",
        "a.b:0",
        "a.b:x",
        "a.b,c.d",
        "127.1",
    ],
)
def test_an_entry_that_is_not_a_host_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(entry))):
        read_allowed(entry)


def test_a_host_that_is_not_allowed_is_told_which_are() -> None:
    with pytest.raises(EgressRefused, match=r"^c.d at port 443 may not be asked. Allowed: a.b, \*.e.f:8443.$"):
        check_allowed(read_url("https://c.d/"), ["a.b", "*.e.f:8443"])
    check_allowed(read_url("https://x.e.f:8443/"), ["a.b", "*.e.f:8443"])


def test_a_trusted_origin_is_exempt_by_scheme_host_and_port() -> None:
    trusted = read_origins(["http://10.0.0.1", "https://wiki.internal:8443", "http://[::1]:8080"])
    for url in ("http://10.0.0.1/a", "http://10.0.0.1:80/", "https://wiki.internal:8443/", "http://[0::1]:8080/"):
        check(read_url(url), trusted)
    for url in ("https://10.0.0.1/", "http://10.0.0.1:8080/", "http://wiki.internal:8443/", "https://[::1]:8080/"):
        with pytest.raises(EgressRefused):
            check(read_url(url), trusted)


def test_a_name_is_not_looked_up_here() -> None:
    check(read_url("https://does-not-exist.invalid/"))
    assert not Target("https", "a.b", 443, "/").is_address
    assert Target("https", "1.1.1.1", 443, "/").is_address
