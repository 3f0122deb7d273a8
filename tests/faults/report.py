"""The table at the end of the fault suite: per kind of fault how many moments and runs, and what came of them."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

PROPERTY = "fault"
"""Under this name a test records its `outcome`, also across pytest's processes."""

Outcome = dict[str, Any]


def outcome(
    fault: str, moment: str, *, runs: int, lost: int = 0, doubled: int = 0, takeovers: Sequence[float] = ()
) -> tuple[str, Outcome]:
    """What one test found, for `record_property(*outcome(…))`. `takeovers`: of each lost lease, seconds from
    the worker's last write to the next claim."""
    return PROPERTY, {
        "fault": fault,
        "moment": moment,
        "runs": runs,
        "lost": lost,
        "doubled": doubled,
        "takeovers": list(takeovers),
    }


def table(outcomes: Iterable[Outcome]) -> list[str]:
    """The lines of the table."""
    groups: dict[str, list[Outcome]] = {}
    for found in outcomes:
        groups.setdefault(found["fault"], []).append(found)
    if not groups:
        return []
    lines = [f"{'fault':44}{'moments':>8}{'runs':>7}{'lost':>6}{'doubled':>9}{'takeover p50':>14}{'max, s':>8}"]
    for fault, tests in groups.items():
        moments = len({one["moment"] for one in tests})
        runs, lost, doubled = (sum(one[what] for one in tests) for what in ("runs", "lost", "doubled"))
        takeovers = [seconds for one in tests for seconds in one["takeovers"]]
        took = f"{statistics.median(takeovers):14.1f}{max(takeovers):8.1f}" if takeovers else f"{'-':>14}{'-':>8}"
        lines.append(f"{fault:44}{moments:8}{runs:7}{lost:6}{doubled:9}{took}")
    return lines
