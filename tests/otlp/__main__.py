"""`python -m tests.otlp MODE`: all four back ends in a process of their own, until its input ends.

Writes their settings, by kind, as JSON.
"""

import json
import sys

from tests.otlp import Mode, all_four

with all_four(Mode(sys.argv[1])) as four:
    print(json.dumps({kind: back_end.settings for kind, back_end in four.items()}), flush=True)
    sys.stdin.read()
