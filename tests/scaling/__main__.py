"""`make simulate-scaling`: prints what came of each scenario, and draws it.

    make simulate-scaling ARGS="--seed 7 --svg docs/scaling.svg"

Exit code 1 where our number asked for fewer workers than were busy, or where the target was missed although MAX_WORKERS
allowed to meet it.
"""

import argparse
import sys
from pathlib import Path

from tests.scaling.drawing import drawing
from tests.scaling.measured import Outcome, measure
from tests.scaling.platform import OURS, PLATFORMS, POLICIES
from tests.scaling.report import LEGEND, table
from tests.scaling.traffic import scenarios

SEED = 7


def simulate(seed: int) -> list[Outcome]:
    """Every scenario on every platform, by each number."""
    return [
        measure(scenario, platform, policy, name=name, seed=seed)
        for scenario in scenarios(seed)
        for platform in PLATFORMS
        for name, policy in POLICIES.items()
    ]


def drawn(outcomes: list[Outcome]) -> str:
    """On the first platform: waits hardly differ between them."""
    there = [outcome for outcome in outcomes if outcome.platform is PLATFORMS[0]]
    return drawing(list(zip(there[::2], there[1::2], strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=SEED, help="another one is other traffic")
    parser.add_argument("--svg", type=Path, help="draw it here")
    options = parser.parse_args()
    outcomes = simulate(options.seed)
    print(table(outcomes), LEGEND, sep="\n\n")
    if options.svg:
        options.svg.write_text(drawn(outcomes))
    broken = [f"{one.title}: {what}" for one in outcomes if one.policy == OURS for what in one.broken]
    print("", *(broken or ["every promise was kept"]), sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
