"""Signatures of webhooks are those of Standard Webhooks, and secrets are as different as their webhooks."""

import base64
import time
from datetime import UTC, datetime, timedelta
from random import Random
from uuid import UUID, uuid4

import pytest

from app.webhook_signature import derive_secret, new_signing_key, sign, write_secret
from tests.webhook_receiver import NotGenuine, verify
from worker.delivery import RetrySchedule, read_retry_after

KEY = "a key of the service's own, of 32 characters"
MESSAGE = "0192f3a6-22bb-4ccc-8ddd-0123456789ab"
BODY = '{"type" : "run.succeeded", "data" : {"agent" : "süß"}}'
NOW = datetime(2026, 11, 2, 9, 30, tzinfo=UTC)


def test_a_signature_is_the_one_that_the_reference_implementation_makes() -> None:
    # Made by the Python library of Standard Webhooks, version 1.1.0, of these values.
    secret = base64.b64decode("C2FVsBQIhrscChlQIMV+b5sSYspob7oD")
    assert sign(secret, MESSAGE, 1_793_611_803, BODY) == "v1,OfhgiA+nGtGnd/WlFFyFAp/7fxmKFCNlLmSupvgOUF4="


def test_the_secret_that_is_shown_verifies_what_was_signed() -> None:
    secret, sent_at = derive_secret(KEY, uuid4()), int(time.time())
    headers = {
        "webhook-id": MESSAGE,
        "webhook-timestamp": str(sent_at),
        "webhook-signature": sign(secret, MESSAGE, sent_at, BODY),
    }
    shown = write_secret(secret)
    verify(shown, headers, BODY.encode())
    for changed in (
        {"webhook-id": str(uuid4())},
        {"webhook-timestamp": str(sent_at + 1)},
        {"webhook-signature": "v1," + "A" * 43 + "="},
    ):
        with pytest.raises(NotGenuine, match="no signature fits"):
            verify(shown, {**headers, **changed}, BODY.encode())
    with pytest.raises(NotGenuine, match="no signature fits"):
        verify(shown, headers, BODY.encode() + b" ")
    with pytest.raises(NotGenuine, match="timestamp"):
        verify(shown, headers, BODY.encode(), now=sent_at + 301)


def test_each_webhook_has_a_secret_of_its_own_that_depends_on_the_key() -> None:
    webhook = UUID("0192f3a1-52cd-7e8f-8a1b-2c3d4e5f6a7b")
    secrets = {derive_secret(key, one) for key in (KEY, KEY + "!") for one in (webhook, uuid4())}
    assert len(secrets) == 4
    assert derive_secret(KEY, webhook) == derive_secret(KEY, webhook)
    assert all(len(secret) == 32 for secret in secrets)  # the specification asks for 24 to 64 bytes


def test_how_secrets_are_derived_never_changes() -> None:
    """Else every tenant's secret would be another one after an upgrade."""
    webhook = UUID("0192f3a1-52cd-7e8f-8a1b-2c3d4e5f6a7b")
    assert write_secret(derive_secret(KEY, webhook)) == "whsec_A9BoHJyqPAhP+kusvFpG2TzjIZE2Mg9zBZwNTxuXEEg="


def test_a_new_signing_key_is_long_enough_for_the_setting() -> None:
    assert len(new_signing_key()) >= 32
    assert new_signing_key() != new_signing_key()


def test_waits_follow_the_schedule_with_a_little_more() -> None:
    schedule, random = RetrySchedule(), Random(1)
    waits = [schedule.wait(attempt, 0, random) for attempt in range(1, 11)]
    assert waits.pop() is None
    assert len(waits) == len(schedule.waits) == 9
    for wait, planned in zip(waits, schedule.waits, strict=True):
        assert wait is not None
        assert planned < wait <= planned * 1.1
    assert len({schedule.wait(1, 0, random) for _ in range(20)}) == 20


@pytest.mark.parametrize(("asked", "waits"), [(0, 5), (3, 5), (60, 60), (1e9, 86_400)])
def test_an_endpoint_may_ask_for_more_time_within_bounds_and_never_for_less(asked: float, waits: float) -> None:
    assert RetrySchedule(jitter=0).wait(1, asked, Random(1)) == waits


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", 0),
        ("120", 120),
        (" 7 ", 7),
        ("1.5", 1.5),
        ("-5", 0),
        ("nan", 0),
        ("inf", 0),
        ("1e999", 0),
        ("soon", 0),
        ("Mon, 02 Nov 2026 09:31:00 GMT", 60),
        ("Mon, 02 Nov 2026 09:31:00 -0000", 60),
        ("Mon, 02 Nov 2026 09:29:00 GMT", 0),
        ("Mon, 99 Nov 2026 09:29:00 GMT", 0),
        ("Mon, 02 Nov 99999999999999 09:29:00 GMT", 0),
    ],
)
def test_retry_after_is_understood_in_both_forms(header: str, seconds: float) -> None:
    assert read_retry_after(header, now=NOW) == pytest.approx(seconds)
    assert read_retry_after(header, now=NOW + timedelta(days=1)) <= max(seconds, 0)
