"""`python -m worker`."""

import signal
import sys

from app.startup import loading

# While this loads there is nothing to drain; and the first process of a container would not hear SIGTERM.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

with loading():
    from worker.main import main

main()
