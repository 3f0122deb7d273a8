"""Hides in text what must not be shown: the service's own secrets, and what is personal or a credential by its form.

Where nothing is found, that is known after looking for a few plain words, which takes a tenth of the time of a regular
expression. The time grows with the length of the text and not faster, whatever is in it; what `REDACT_PATTERNS` names
takes as long as those patterns take.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from urllib.parse import quote

from pydantic import JsonValue

HIDDEN = "[hidden]"
"""A secret of the service: a setting, one of our API keys, a webhook's secret, a password in an address."""
EMAIL = "[email]"
CARD = "[card]"
CREDENTIAL = "[credential]"
"""Somebody's key, token or private key."""
REDACTED = "[redacted]"
"""What a pattern of the setting names."""

MIN_SECRET = 10
"""Characters. To hide a shorter one wherever it stands would make text hard to read, and tell what it is."""

_OURS = re.compile(r"ask_[0-9A-Za-z]{6,}_[0-9A-Za-z_-]{6,}|whsec_[0-9A-Za-z+/=_-]{6,}")
_IN_ADDRESS = re.compile(r"""://[^/\s:@"'\\]*:[^/\s"'\\]+@""")

_FORMS = {
    "sk-": r"(?=[A-Za-z_-]{0,64}[0-9])[\w-]{16,}",  # OpenAI, Anthropic, OpenRouter, Langfuse
    "gsk_": r"\w{20,}",  # Groq
    "xai-": r"\w{20,}",
    "pplx-": r"\w{20,}",
    "hf_": r"\w{20,}",
    "lsv2_": r"[a-z]{2}_\w{20,}",
    "sk_live_": r"\w{10,}",  # Stripe
    "sk_test_": r"\w{10,}",
    "rk_live_": r"\w{10,}",
    "gh": r"[oprsu]_\w{20,}",  # GitHub
    "github_pat_": r"\w{20,}",
    "glpat-": r"[\w-]{16,}",
    "npm_": r"\w{30,}",
    "pypi-": r"[\w-]{16,}",
    "AKIA": r"[0-9A-Z]{16}(?!\w)",
    "ASIA": r"[0-9A-Z]{16}(?!\w)",
    "AIza": r"[\w-]{35}",
    "ya29.": r"[\w.-]{20,}",
    "GOCSPX-": r"[\w-]{20,}",
    "xox": r"[a-z]-[\w-]{10,}",  # Slack
    "xapp-": r"[\w-]{10,}",
    "SG.": r"[\w-]{16,}\.[\w-]{16,}",
    "dapi": r"[0-9a-f]{32}",
    "hvs.": r"[\w-]{20,}",
    "eyJ": r"[\w-]{8,}+\.[\w-]{8,}+(?:\.[\w-]*+)+",  # a JSON Web Token
    "-----BEGIN ": (
        r"[A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:[0-9A-Za-z+/=,:\s\\]|-(?!----))*+(?:-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----)?"
    ),
}
"""Credentials: how they begin, and what follows then. A word that only ends like such a beginning is none."""
_BEFORE = {"eyJ": r"[\w-]", "-----BEGIN ": "(?!)"}
"""Where other signs than letters and digits would make the beginning a part of a word, or none."""


def _begins(literal: str) -> str:
    """This, where it is no part of a word. In JSON, the letter before it may be that of an escape.

    It looks back from behind the literal, for which the engine can search fast.
    """
    begin, word = re.escape(literal), _BEFORE.get(literal, "[0-9A-Za-z]")
    return rf"{begin}(?:(?<!{word}{begin})|(?<=\\[bfnrt]{begin})|(?<=\\u[0-9A-Fa-f]{{4}}{begin}))"


_CREDENTIALS = [(begin, re.compile(_begins(begin) + rest, re.ASCII)) for begin, rest in _FORMS.items()]

_IS = r"""["'\\]{0,3}[ \t]{0,4}[:=][ \t]{0,4}["'\\]{0,3}"""
_SIGN = r"[\w.~+/=-]"
_WORD = r"(?:\b|(?<=\\[bfnrt])|(?<=\\u[0-9A-Fa-f]{4}))"
_NO_WORD = rf"(?={_SIGN}*[0-9=]|{_SIGN}*(?-i:[a-z][A-Z]){_SIGN}*(?-i:[a-z][A-Z]))"
"""Of a token, not "basic understanding": a digit, or more humps than a word has."""
_HEADERS = {
    "authorization": rf"(authorization{_IS})(?:bearer|basic|token|apikey|negotiate)[ \t]{{1,8}}[^\s\"'\\,;\[]{{4,}}",
    "key": rf"(api[_-]?key{_IS})(?={_SIGN}{{0,64}}[0-9]){_SIGN}{{8,}}",
    "bearer": rf"{_WORD}(bearer[ \t]{{1,8}}){_NO_WORD}{_SIGN}{{12,}}",
    "basic": rf"{_WORD}(basic[ \t]{{1,8}}){_NO_WORD}{_SIGN}{{8,}}",
}
"""Credentials by what they are called in a request's head: a telltale in lower case, and the pattern."""
_IN_HEADERS = [(telltale, re.compile(pattern, re.ASCII | re.IGNORECASE)) for telltale, pattern in _HEADERS.items()]

_LOCAL = r"[\w.%+~-]"
_EMAIL = re.compile(
    # In JSON, the letter behind a backslash is not the address' first, and without it this would be JSON no more.
    rf"(?<!{_LOCAL})((?<=\\)(?:u[0-9A-Fa-f]{{4}}|[nrtbf]))?+{_LOCAL}++"
    r"@(?:[\w-]++\.)+[^\W\d_]{2}[\w-]*+"
)

_RUN = r"[0-9](?=[0-9 \u00a0\u202f\u2010-\u2015-]{12})(?:[ \u00a0\u202f\u2010-\u2015-]?[0-9]){12}"
_MAY_HOLD_CARD = re.compile(_RUN)
_DIGITS = re.compile(
    r"\\u[0-9A-Fa-f]{4}"
    r"|(?<![0-9A-Za-z])[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}(?![0-9A-Za-z])"
    rf"|(?P<run>{_RUN}(?:[ \u00a0\u202f\u2010-\u2015-]?[0-9])*+)"
)
"""A run of digits, single spaces and dashes between them; or, so as not to begin in its middle, what is no number."""
_ISSUER = re.compile("2[2-7]|[3-6]")
"""How card numbers begin. 20 and 21 are left out: dates do."""

MIN_DIGITS, MAX_DIGITS = 13, 19
"""Of a card's number."""
MIN_GROUP = 3
"""Digits between two spaces or dashes; in shorter groups only who wants to hide it writes such a number."""

_MARKER = r"\[(?:hidden|email|card|credential|redacted)\]"


class Redaction:
    """`secrets`: the service's own. `patterns`: regular expressions that `check_pattern` has accepted.

    Markers stay as they are when text is hidden again.
    """

    def __init__(self, secrets: Iterable[str] = (), patterns: Iterable[str] = ()) -> None:
        self._secrets = sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True)
        self._patterns = [re.compile(f"{pattern}|{_MARKER}") for pattern in patterns]

    def hide_secrets(self, text: str) -> str:
        """Without the service's own secrets: those it was given, and by their form API keys, webhooks' secrets and
        passwords in addresses."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        if "ask_" in text or "whsec_" in text:
            text = _OURS.sub(HIDDEN, text)
        return _IN_ADDRESS.sub(f"://{HIDDEN}@", text) if "://" in text else text

    def hide_personal(self, text: str) -> str:
        """Without secrets, credentials of others, e-mail addresses, card numbers, and what the patterns name."""
        text = _hide_credentials(self.hide_secrets(text))
        if "@" in text:
            text = _EMAIL.sub(rf"\1{EMAIL}", text)
        if _MAY_HOLD_CARD.search(text):
            text = _DIGITS.sub(_without_cards, text)
        for pattern in self._patterns:
            text = pattern.sub(_redacted, text)
        return text


_BY_FORM = Redaction()
without_secrets, without_personal = _BY_FORM.hide_secrets, _BY_FORM.hide_personal
"""The same where the settings are not known: only what shows by its form."""


def hide_in(value: JsonValue, hide: Callable[[str], str]) -> JsonValue:
    """Apply `hide` to all text inside of a value, names included, and to whole numbers: a card's may be one."""
    match value:
        case str():
            return hide(value)
        case int() if not isinstance(value, bool):
            written = str(value)
            return value if (hidden := hide(written)) == written else hidden
        case list():
            return [hide_in(item, hide) for item in value]
        case dict():
            return {hide(name): hide_in(item, hide) for name, item in value.items()}
        case _:
            return value


def check_pattern(pattern: str) -> None:
    """Raises `ValueError` that says why this cannot be used."""
    try:
        compiled = re.compile(f"{pattern}|{_MARKER}")
    except re.error as error:
        raise ValueError(f"is no regular expression: {error.msg} at position {error.pos}") from None
    if compiled.search(""):
        raise ValueError("also matches where there is nothing")


def _forms(secret: str) -> Iterator[str]:
    """How the secret may be written: as it is, line by line, by Python, in an address, in JSON."""
    for part in (secret, *secret.splitlines()):
        if len(part) >= MIN_SECRET:
            yield from (part, repr(part)[1:-1], quote(part, safe=""))
            yield from (json.dumps(part, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False))


def _hide_credentials(text: str) -> str:
    for begin, form in _CREDENTIALS:
        if begin in text:
            text = form.sub(CREDENTIAL, text)
    lower = text.lower()
    for telltale, header in _IN_HEADERS:
        if telltale in lower:
            text = header.sub(rf"\1{CREDENTIAL}", text)
    return text


def _redacted(found: re.Match[str]) -> str:
    return found[0] if not found[0] or re.fullmatch(_MARKER, found[0]) else REDACTED


def _without_cards(found: re.Match[str]) -> str:
    """The run of digits without the card numbers in it: 13 to 19 digits, whole groups, with the right check digit."""
    run = found["run"]
    if run is None:
        return found[0]
    groups = [group.span() for group in re.finditer("[0-9]+", run)]
    if _is_long(groups[0]) and _goes_on_before(found):
        del groups[0]
    if groups and _is_long(groups[-1]) and _goes_on_behind(found):
        del groups[-1]
    shown, done = "", 0
    for begin, end in _joined(_cards(run, groups)):
        shown, done = f"{shown}{run[done:begin]}{CARD}", end
    return shown + run[done:]


def _cards(run: str, groups: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Where card numbers are, in order of their begin; one may be part of another."""
    digits = "".join(run[begin:end] for begin, end in groups)
    lengths = [end - begin for begin, end in groups]
    starts = [0, *accumulate(lengths)]
    # Luhn's sum up to each digit, with every other digit doubled: those at even places, or those at odd ones.
    sums = [
        [0, *accumulate(_DOUBLED[digit] if place % 2 == odd else int(digit) for place, digit in enumerate(digits))]
        for odd in (0, 1)
    ]
    after = 0
    for first, (begin, _) in enumerate(groups):
        start = starts[first]
        # Of short groups there may be very many: a number begins where their row does, or the last number ends.
        is_within_row = first != after and lengths[first - 1] == lengths[first] < MIN_GROUP
        if is_within_row or not _ISSUER.match(digits, start):
            continue
        for last in range(bisect_left(starts, start + MIN_DIGITS), bisect_right(starts, start + MAX_DIGITS)):
            stop = starts[last]
            is_checked = (sums[stop % 2][stop] - sums[stop % 2][start]) % 10 == 0
            if is_checked and _are_of_card(lengths[first:last]):
                after = max(after, last)
                yield begin, groups[last - 1][1]


def _are_of_card(lengths: Sequence[int]) -> bool:
    """Are digits grouped so in a card's number, as 4-4-4-4 or 4-6-5, or all groups alike but for the last? A row of
    numbers and the address of a host are not."""
    return min(lengths) >= MIN_GROUP or len(set(lengths[:-1])) == 1


_DOUBLED = {str(digit): sum(map(int, str(2 * digit))) for digit in range(10)}


def _joined(found: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Those that overlap become one."""
    joined: tuple[int, int] | None = None
    for begin, end in found:
        if joined and begin < joined[1]:
            joined = joined[0], max(end, joined[1])
        else:
            if joined:
                yield joined
            joined = begin, end
    if joined:
        yield joined


def _is_long(group: tuple[int, int]) -> bool:
    """Enough for a card's number, so that it matters whether it is one group of digits or a part of something."""
    return group[1] - group[0] >= MIN_DIGITS


def _goes_on_before(found: re.Match[str]) -> bool:
    """Is this what follows a decimal point, or the end of an id in hex digits?"""
    before = found.string[max(0, found.start() - 64) : found.start()]
    return bool(re.search(r"[0-9]\.\Z|(?<![0-9A-Za-z\\])(?=[0-9]*[A-Fa-f])[0-9A-Fa-f]+\Z", before))


def _goes_on_behind(found: re.Match[str]) -> bool:
    """Is this the beginning of an id in hex digits?"""
    behind = found.string[found.end() : found.end() + 64]
    return bool(re.match(r"[0-9A-Fa-f]+(?![0-9A-Za-z])", behind))
