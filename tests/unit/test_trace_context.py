"""W3C Trace Context as a caller sends it: read to the letter, and what does not fit is as if it were not there."""

import pytest

from app.domain.trace_context import TraceContext

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
FULL_WIDTH_ZERO = "\uff10"
FITS = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("flags", "is_sampled"), [("00", False), ("01", True), ("02", False), ("03", True), ("fe", False), ("ff", True)]
)
def test_of_the_flags_only_the_last_bit_is_known(flags: str, is_sampled: bool) -> None:
    assert TraceContext.parse(f"00-{TRACE}-{SPAN}-{flags}") == TraceContext(TRACE, SPAN, is_sampled)


@pytest.mark.parametrize("version", ["01", "cc", "fe"])
@pytest.mark.parametrize("more", ["", "-", "-what-the-future-will-be-like", "-ü"])
def test_of_a_later_version_what_this_one_knows_is_read(version: str, more: str) -> None:
    context = TraceContext.parse(f"{version}-{TRACE}-{SPAN}-09{more}")
    assert context == TraceContext(TRACE, SPAN, True)
    assert str(context) == FITS


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "-",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-",
        f"00-{TRACE}-{SPAN}-01-what-the-future-will-be-like",
        f"00-{TRACE}-{SPAN}-01.",
        f"cc-{TRACE}-{SPAN}-01.what-the-future-will-not-be-like",
        f"cc-{TRACE}-{SPAN}-010",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"cc-{'0' * 32}-{SPAN}-01",
        FITS.upper(),
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN.upper()}-01",
        f"00-{TRACE}-{SPAN}-0A",
        f"0-{TRACE}-{SPAN}-01",
        f"000-{TRACE}-{SPAN}-01",
        f".0-{TRACE}-{SPAN}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00-{TRACE[1:]}.-{SPAN}-01",
        f"00-{TRACE}-{SPAN[1:]}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}",
        f"00_{TRACE}_{SPAN}_01",
        f"00{TRACE}{SPAN}01",
        f" {FITS}",
        f"{FITS} ",
        f"{FITS}\n",
        f"00-{FULL_WIDTH_ZERO * 31}1-{SPAN}-01",
        f"{FITS},{FITS}",
    ],
)
def test_what_does_not_fit_is_not_looked_at(traceparent: str) -> None:
    assert TraceContext.parse(traceparent) is None


def test_it_is_passed_on_as_it_came() -> None:
    assert str(TraceContext.parse(FITS)) == FITS
    assert str(TraceContext(TRACE, SPAN, False)) == f"00-{TRACE}-{SPAN}-00"
