"""The outcomes as a table, for a terminal."""

from collections.abc import Sequence

from tests.scaling.measured import REACTION_S, Outcome
from tests.scaling.traffic import TARGET_DRAIN_S

_TITLES = (
    *("SCENARIO", "PLATFORM", "NUMBER", "P50", "P95", "MAX", "DRAIN"),
    *("BELOW", "STOPPED", "HANDED BACK", "NOT ENDED", "HOURS"),
)
_LEFT = 3
"""So many columns are words."""
LEGEND = f"""\
P50, P95, MAX  seconds for which runs waited for a worker
DRAIN          the longest of them, less the {REACTION_S:.0f} s that it takes to poll a number and to start a worker;
               the target is {TARGET_DRAIN_S:.0f}. (…): not promised, for MAX_WORKERS or for two kinds of runs
BELOW          how often the number was lower than that of the workers that were busy
STOPPED        workers that were busy when the platform stopped them
HANDED BACK    runs of theirs that did not end within the grace, and went on elsewhere from their last step
NOT ENDED      runs that were still queued or running 15 minutes after the last one had come
HOURS          of workers: what is paid"""


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [_TITLES, *(_row(outcome) for outcome in outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < _LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _row(outcome: Outcome) -> tuple[str, ...]:
    is_promised = outcome.scenario.is_one_kind and not outcome.is_bounded
    drain = f"{outcome.drain_s:.0f}" if is_promised else f"({outcome.drain_s:.0f})"
    return (
        outcome.scenario.name,
        outcome.platform.name,
        outcome.policy,
        *(f"{seconds:.1f}" for seconds in (outcome.p50_s, outcome.p95_s, outcome.max_s)),
        drain,
        *(str(number) for number in (outcome.below_busy, outcome.busy_stopped, outcome.handed_back, outcome.unended)),
        f"{outcome.worker_hours:.1f}",
    )
