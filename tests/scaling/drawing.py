"""Queue, workers and waits over time, of two numbers of workers, as an SVG. The same outcomes give the same file."""

from collections.abc import Sequence
from itertools import pairwise
from xml.sax.saxutils import escape

from tests.scaling.measured import Outcome

_WIDTH, _HEIGHT = 300, 90
"""Of a chart, without its margins."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 26, 20
_HEAD = 64
_COLOURS = ("#0b6bcb", "#d9822b")
_BUCKET_S = 60.0
_CHARTS = ("queued runs", "workers", "longest wait, s")

Points = list[tuple[float, float]]


def drawing(pairs: Sequence[tuple[Outcome, Outcome]]) -> str:
    """A row for each scenario, with both of its outcomes in each chart."""
    across, down = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    width, height = across * len(_CHARTS), _HEAD + down * len(pairs)
    body = [_legend([outcome.policy for outcome in pairs[0]])]
    for row, pair in enumerate(pairs):
        for column, (name, lines) in enumerate(zip(_CHARTS, zip(*map(_series, pair), strict=True), strict=True)):
            title = f"{pair[0].scenario.name}: {name}"
            place = f"translate({across * column + _LEFT} {_HEAD + down * row + _TOP})"
            body.append(f'<g transform="{place}">{_chart(title, lines)}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        f' font-size="11" role="img" aria-label="Queue, workers and waits over time">\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _series(outcome: Outcome) -> tuple[Points, Points, Points]:
    longest: dict[int, float] = {}
    for at, wait in outcome.waits:
        bucket = int(at // _BUCKET_S)
        longest[bucket] = max(wait, longest.get(bucket, 0.0))
    buckets = range(int(outcome.history[-1].at // _BUCKET_S) + 1)
    return (
        [(moment.at, moment.queued) for moment in outcome.history],
        [(moment.at, moment.workers) for moment in outcome.history],
        [(bucket * _BUCKET_S, longest.get(bucket, 0.0)) for bucket in buckets],
    )


def _legend(names: Sequence[str]) -> str:
    parts = [
        '<text x="16" y="24" font-size="15" font-weight="bold">One number of workers, or the length of the queue</text>'
    ]
    at = 16
    for name, colour in zip(names, _COLOURS, strict=True):
        parts.append(f'<rect x="{at}" y="38" width="18" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{at + 24}" y="44">{escape(name)}</text>')
        at += 24 + 8 * len(name) + 16
    return "\n".join(parts)


def _chart(title: str, lines: Sequence[Points]) -> str:
    last = max(at for points in lines for at, _ in points) or 1.0
    highest = max(value for points in lines for _, value in points) or 1.0
    parts = [
        f'<text x="0" y="-8" font-weight="bold">{escape(title)}</text>',
        f'<path d="M0 0V{_HEIGHT}H{_WIDTH}" fill="none" stroke="#999"/>',
        f'<text x="-6" y="9" text-anchor="end">{highest:.0f}</text>',
        f'<text x="-6" y="{_HEIGHT}" text-anchor="end">0</text>',
        f'<text x="{_WIDTH}" y="{_HEIGHT + 14}" text-anchor="end">{last / 60:.0f} min</text>',
    ]
    # The first one is drawn last, above the other.
    for points, colour in reversed(list(zip(lines, _COLOURS, strict=True))):
        path = _path([(round(_WIDTH * at / last), round(_HEIGHT * (1 - value / highest))) for at, value in points])
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-linejoin="round"/>')
    return "".join(parts)


def _path(pixels: list[tuple[int, int]]) -> str:
    """Without those in the middle of a level stretch."""
    kept = pixels[:1]
    for here, following in pairwise(pixels[1:]):
        if not kept[-1][1] == here[1] == following[1]:
            kept.append(here)
    kept += pixels[-1:]
    return "M" + " ".join(f"{x} {y}" for x, y in kept)
