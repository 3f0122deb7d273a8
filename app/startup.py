"""What a process does with its memory while it starts."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SWITCH_SECONDS = 0.0005


@contextmanager
def loading() -> Iterator[None]:
    """Around the imports and the making of what lives as long as the process.

    Nothing is collected meanwhile, because nearly all of it stays. At the end what stays is put out of the collector's
    sight, so that it never stops a request to look through it, and what was freed goes back to the system.

    The event loop waits at most half a millisecond for a thread that computes (RQ's bookkeeping), instead of
    Python's 5: whenever the loop reads a socket such a thread takes over, so it would lose that time again and again.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
        with suppress(OSError, AttributeError):  # glibc only, and only there it is needed
            ctypes.CDLL(None).malloc_trim(0)
