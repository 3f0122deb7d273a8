"""What is personal or secret is hidden wherever it stands, what only looks a little like it stays, and it is cheap."""

import json
import time
from uuid import UUID, uuid4

import pytest
from pydantic import JsonValue

from app.config import load_settings
from app.domain.errors import ConfigurationError
from app.domain.ids import new_id
from app.redaction import HIDDEN, Redaction, check_pattern, hide_in, without_personal, without_secrets

API_KEY = "ask_0123456789ab_" + "k" * 43
SECRET = "hunter2-hunter2"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nabc+/def==\n-----END RSA PRIVATE KEY-----"
OURS = Redaction([SECRET], [r"CUST-\d+", r"(?i)project (bluebird|robin)", r"\b(\w)\1{5}\b"])

EMAILS = {
    "write to bob@example.com.": "write to [email].",
    "Bob <bob.o+tag@mail.example.co.uk>,": "Bob <[email]>,",
    "to=bob_1@ex-ample.org&x": "to=[email]&x",
    "j\u00fcrgen@m\u00fcller.example": "[email]",
    "bob%40home@xn--mller-kva.example": "[email]",
    '{"text":"hi\\nalice@example.com"}': '{"text":"hi\\n[email]"}',
    '{"text":"\\u2014alice@example.com"}': '{"text":"\\u2014[email]"}',
    "DOMAIN\\alice@example.com": "DOMAIN\\[email]",
    "mailto:bob@example.com?subject=x": "mailto:[email]?subject=x",
    "a@b.example,c@d.example": "[email],[email]",
}
CARDS = {
    "card 4111111111111111.": "card [card].",
    "4111 1111 1111 1111 exp 12/28": "[card] exp 12/28",
    "4111-1111-1111-1111 12 28 123": "[card] 12 28 123",
    "5500\u00a00000\u00a00000\u00a00004": "[card]",
    "3782 822463 10005": "[card]",
    "30569309025904": "[card]",
    "4222 2222 2222 2": "[card]",
    "6304 0000 0000 0000 000": "[card]",
    "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1": "[card]",
    " ".join("4111111111111111" * 2): "[card] [card]",
    "no. 7 4111 1111 1111 1111": "no. 7 [card]",
    "1.4111 1111 1111 1111": "1.[card]",
    "card4111111111111111x": "card[card]x",
    "card_4111111111111111": "card_[card]",
    "4111 1111 1111 1111 5500 0000 0000 0004": "[card] [card]",
    '{"n":4111111111111111,"m":"\\u20144111111111111111"}': '{"n":[card],"m":"\\u2014[card]"}',
}
CREDENTIALS = {
    "sk-proj-Ab3defghijklmnopqrst": "[credential]",
    "key=sk-ant-api03-abcdefghijklmnop, ok": "key=[credential], ok",
    "ghp_0123456789abcdefghijABCDEFGHIJ": "[credential]",
    "https://github_pat_0123456789abcdefghij@host": "https://[credential]@host",
    "AKIAIOSFODNN7EXAMPLE": "[credential]",
    "xoxb-123456789012-abcdefghij": "[credential]",
    "AIza" + "a1" * 17 + "b": "[credential]",
    f"token {JWT}!": "token [credential]!",
    f"before\n{PEM}\nbehind": "before\n[credential]\nbehind",
    json.dumps({"pem": PEM, "x": 1}): '{"pem": "[credential]", "x": 1}',
    PEM[:60]: "[credential]",
    f"KEY=x{PEM}": "KEY=x[credential]",
    "Authorization: Bearer abcdefgh": "Authorization: [credential]",
    '"authorization": "Basic dXNlcjpwYXNz"': '"authorization": "[credential]"',
    "curl -H 'x-api-key: 0a1b2c3d4e'": "curl -H 'x-api-key: [credential]'",
    "with bearer abcdef1234567890": "with bearer [credential]",
    "Basic dXNlcjpwYXNz": "Basic [credential]",
}
OTHERS = {
    f"it is {SECRET}, and {API_KEY}": f"it is {HIDDEN}, and {HIDDEN}",
    "of CUST-4711 in Project Bluebird": "of [redacted] in [redacted]",
    "xxxxxx": "[redacted]",
    "bob@example.com CUST-1 CUST-2": "[email] [redacted] [redacted]",
}
HARMLESS = [
    "2026-11-03 12:34:56,789 2026-11-03T12:34:56.789+00:00 20261103123455",
    "1793600000.123456 1793600000000 1793600000000000000 0.4111111111111111 3.141592653589793",
    "550e8400-e29b-4316-8316-446655440000 4111111111111111a 0a4111111111111111",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "4111 1111 1111 1112, 1234 5678 9012 3456, 172-31-45-67-31457-412348",
    "pip install pkg@1.2.3, @name, a@b, user@host:5432, https://medium.example/@user",
    "task-force-number-one-2026-and-more, disk-usage-1234567890, ask-me, sk-learn-pipeline-extras",
    "basic understanding, basic JavaScript, the bearer of tokens, no authorization: required",
    "AKIA, eyJ.x, sk-, -----BEGIN CERTIFICATE-----",
    "max_tokens: 100000, duration_ms 12.5, $1,234,567,890,123",
]


@pytest.mark.parametrize("text", [*EMAILS, *CARDS, *CREDENTIALS, *OTHERS])
def test_what_is_personal_is_replaced_by_what_it_was_and_only_once(text: str) -> None:
    hidden = OURS.hide_personal(text)
    assert hidden == (EMAILS | CARDS | CREDENTIALS | OTHERS)[text]
    assert OURS.hide_personal(hidden) == hidden


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_not_personal_stays(text: str) -> None:
    assert without_personal(text) == text


def test_ids_stay_as_they_are() -> None:
    for _ in range(3_000):
        for made in (new_id(), uuid4()):
            assert without_personal(f"{made} {made.hex}") == f"{made} {made.hex}"
    # One half of digits only, and with a card's check digit.
    number = UUID("01900000-0000-7000-4111-111111111111")
    assert without_personal(f"run {number}: {number.hex[:15]}a{number.hex[16:]}") == (
        f"run {number}: {number.hex[:15]}a{number.hex[16:]}"
    )


def test_the_services_own_secrets_are_all_that_is_hidden_where_the_rest_may_be_shown() -> None:
    personal = "bob@example.com 4111111111111111 sk-proj-Ab3defghijklmnopqrst CUST-1"
    assert OURS.hide_secrets(f"{SECRET} {API_KEY} {personal}") == f"{HIDDEN} {HIDDEN} {personal}"


@pytest.mark.parametrize("escape", ["\n", "\r", "\t", "\b", "\f", "\u2014", "\u00fc"])
def test_what_stands_behind_an_escape_of_json_is_hidden_and_it_stays_json(escape: str) -> None:
    for text in ("bob@example.com", "4111111111111111", "sk-proj-Ab3defghijklmnopqrst", JWT, PEM, "Basic dXNlcjpwYXNz"):
        for is_ascii in (True, False):
            hidden = json.loads(without_personal(json.dumps(f"{escape}{text}", ensure_ascii=is_ascii)))
            is_part_of_it = text.startswith("bob") and escape == "\u00fc" and not is_ascii
            assert hidden.startswith("" if is_part_of_it else escape)
            assert hidden[0 if is_part_of_it else 1 :] in ("[email]", "[card]", "[credential]", "Basic [credential]")


def test_a_secret_is_hidden_in_every_way_that_it_may_be_written() -> None:
    for secret in ('quoted"back\\slash/1234567890', "schl\u00fcssel-1234567890", PEM):
        redaction = Redaction([secret])
        for line in (secret, *secret.splitlines()):
            for form in (line, json.dumps(line), json.dumps(line, ensure_ascii=False), repr(line)):
                assert redaction.hide_secrets(f"a {form} b").strip("ab \"'") in (HIDDEN, f"{HIDDEN}\n{HIDDEN}")
    assert Redaction(["short"]).hide_secrets("a short word") == "a short word"
    assert Redaction(["sk-own-0123456789abcdef"]).hide_personal("sk-own-0123456789abcdef") == HIDDEN


def test_a_password_in_an_address_is_hidden_and_the_rest_is_not() -> None:
    text = "cannot reach postgresql://service:hunter2%40@db.internal:5432/name?x=1, nor redis://:pw@cache:6379/0"
    assert without_secrets(text) == (
        f"cannot reach postgresql://{HIDDEN}@db.internal:5432/name?x=1, nor redis://{HIDDEN}@cache:6379/0"
    )


def test_what_is_no_secret_stays() -> None:
    for text in (
        "task_0123456789ab is asked",
        "https://example.com:8080/a@b",
        'see "https://example.com", "b@example.com"',
        "ask_ whsec_ ask_short",
    ):
        assert without_secrets(text) == text


def test_values_keep_their_shape() -> None:
    value: JsonValue = {
        "a@b.example": [4111111111111111, 4711, True, 1.5, None, {"x": "CUST-1"}],
        "n": 4111111111111112,
    }
    assert hide_in(value, OURS.hide_personal) == {
        "[email]": ["[card]", 4711, True, 1.5, None, {"x": "[redacted]"}],
        "n": 4111111111111112,
    }
    assert hide_in(True, lambda _: "hidden") is True


def test_a_pattern_changes_no_marker_and_nothing_where_it_matches_nothing() -> None:
    assert Redaction([], ["[a-z]+"]).hide_personal("1 abc a@b.example") == "1 [redacted] [email]"
    assert Redaction([], [r"x|(?=y)"]).hide_personal("x y") == "[redacted] y"
    # A pattern sees what else was hidden, and may well hide more.
    assert Redaction([], [r"customer \S+ \d+"]).hide_personal("customer a@b.example 4711") == "[redacted]"


@pytest.mark.parametrize(
    ("patterns", "why"),
    [
        ('["a+", "(b"]', "pattern 2 is no regular expression: "),
        ('["a*"]', "pattern 1 also matches where there is nothing"),
        ('[""]', "pattern 1 also matches where there is nothing"),
        ("hunter2", "must be JSON"),
        ('"hunter2"', ""),
        ("[1]", ""),
    ],
)
def test_a_pattern_that_cannot_be_used_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, patterns: str, why: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://db/x")
    monkeypatch.setenv("REDIS_URL", "redis://redis")
    monkeypatch.setenv("REDACT_PATTERNS", patterns)
    with pytest.raises(ConfigurationError, match=f"^REDACT_PATTERNS is malformed: {why}") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_a_pattern_may_be_whatever_python_takes() -> None:
    for pattern in (r"(?i)abc", r"(?x) a  # a letter", r"(?P<x>a)(?P=x)", r"a|b", r"\bx\b"):
        check_pattern(pattern)
    assert Redaction([], [r"(?i)abc", r"(?x) q  # a letter"]).hide_personal("ABC q") == "[redacted] [redacted]"


LARGE = ["@", "4", ".", "a-", "a@", "sk-", "eyJaaaaaaaaa-", "://a:"]
HOSTILE = [
    *(
        "4 ",
        "41-",
        "4444-",
        "a.a@a.",
        "xoxb-",
        "ask_aaaaaa",
        "whsec_",
        "\\u00fc",
        "eyJ.",
        "-----BEGIN PRIVATE KEY-----",
    ),
    *("basic ", "bearer \t", "authorization:", "api_key=", "0123456789abcdef-", "01234567-0123-", "SG.", "-----", "aB"),
]


@pytest.mark.parametrize(
    ("bait", "size"), [*((bait, 1_000_000) for bait in LARGE), *((bait, 100_000) for bait in HOSTILE)]
)
def test_hostile_text_takes_time_in_proportion(bait: str, size: int) -> None:
    """Ten times as much of it takes about ten times as long; what was quadratic would take a hundred times."""

    def seconds(size: int) -> float:
        text = f"basic a@{bait * (size // len(bait))}"
        began = time.process_time()
        OURS.hide_personal(text)
        return time.process_time() - began

    tenth, whole = min(seconds(size // 10) for _ in range(3)), seconds(size)
    assert whole < 30 * tenth + 0.02


def test_looking_costs_next_to_nothing() -> None:
    redaction = Redaction([SECRET] * 10)
    line = json.dumps({"event": "request", "request_id": "f" * 32, "path": "/v1/runs/{run_id}", "more": "x" * 200})
    prose = ("The customer asked for 12.50 EUR of order 4711-22, 2026-11-03; see https://shop.example/4711. " * 200)[
        :10_000
    ]
    for name, text, bound in (("a line", line, 100e-6), ("10 kB", prose, 2.5e-3)):
        began = time.process_time()
        for _ in range(500):
            redaction.hide_personal(text)
        each = (time.process_time() - began) / 500
        print(f"{name}: {each * 1e6:.1f} \u00b5s")
        assert each < bound
