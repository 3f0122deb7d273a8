"""Stand-ins for tracing back ends over loopback HTTP: each keeps what it is sent, and asserts how it is sent.

    with receiver("langfuse") as back_end:
        start_the_service(env=back_end.settings)
        spans = back_end.until(trace_id, 5)

Written after the back ends' own documentation and the OTLP specification; no code is shared with the service. A request
that the real one would not take is answered 400, and fails the test when the receiver closes: `complaints`.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tests.otlp.back_end import BackEnd
from tests.otlp.fronts import KINDS, Kind
from tests.otlp.server import RETRY_AFTER_SECONDS, Mode
from tests.otlp.spans import Span, spans_of

__all__ = [
    "KINDS",
    "RETRY_AFTER_SECONDS",
    "BackEnd",
    "Kind",
    "Mode",
    "Span",
    "all_four",
    "receiver",
    "settings_of",
    "spans_of",
]


@contextmanager
def receiver(kind: Kind = "collector", *, port: int = 0, mode: Mode = Mode.OK) -> Iterator[BackEnd]:
    """One that runs until the end of the block, which fails when anything that it was sent is not as it must be."""
    back_end = BackEnd(kind, port)
    back_end.mode = mode
    try:
        yield back_end
    finally:
        back_end.close()
    assert not back_end.complaints, f"{kind} complains: {back_end.complaints}"


@contextmanager
def all_four(mode: Mode = Mode.OK) -> Iterator[dict[Kind, BackEnd]]:
    """Langfuse, Phoenix, LangSmith and Datadog at once; see `settings_of`."""
    with ExitStack() as stack:
        yield {kind: stack.enter_context(receiver(kind, mode=mode)) for kind in KINDS}


def settings_of(back_ends: Mapping[Kind, BackEnd]) -> dict[str, str]:
    """The environment variables that make the service send to all of them."""
    return {name: value for back_end in back_ends.values() for name, value in back_end.settings.items()}
