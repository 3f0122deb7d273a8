"""`make soak` after the faults: schemathesis for twenty minutes, against a service of its own.

    make soak FUZZ_MINUTES=20 FUZZ_SEED=7

Exit code 1 where it finds something, or where the API has logged an error.
"""

import argparse
import sys
from random import SystemRandom

from app.devstack.processes import Reaper
from tests.fuzz import SILENT, errors_in, fuzz
from tests.stack import Stack, new_directory

EXAMPLES = 10_000
"""Of each operation: more than there is time for."""


class FuzzedStack(Stack):
    @property
    def sealing_env(self) -> dict[str, str]:
        return super().sealing_env | SILENT


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(2**32), help="asks the same again")
    options = parser.parse_args()
    print(f"fuzzing: seed {options.seed}, {options.minutes:g} minutes", flush=True)
    with new_directory() as directory, Reaper() as reaper:
        stack = FuzzedStack(directory, reaper)
        try:
            stack.start()
            found = fuzz(
                stack.api.address,
                stack.database_url,
                directory,
                seed=options.seed,
                seconds=options.minutes * 60,
                examples=EXAMPLES,
                workers=2,
            )
            errors = errors_in(stack.api.log)
        finally:
            stack.stop()
    print(found.text)
    print(f"{found.requests} requests to {found.tested} of {found.operations} operations, {found.failures} failures")
    for line in errors[:20]:
        print(line)
    return 0 if found.is_clean and not errors else 1


if __name__ == "__main__":
    sys.exit(main())
