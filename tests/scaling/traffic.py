"""The scenarios: when runs come, what each takes, and what the operator has set."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from random import Random

from app.domain.scaling import ScalingRules

TARGET_DRAIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A run: when it is accepted, and for how long a worker has to hold it. Seconds."""

    at: float
    takes: float


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    arrivals: tuple[Arrival, ...]
    rules: ScalingRules
    lasts: float
    """Seconds until the last run may be accepted; then the cluster has time to come to rest."""
    is_one_kind: bool = True
    """The median says what runs take. Where there are two kinds it does not, and no drain in time is promised."""


def scenarios(seed: int) -> list[Scenario]:
    """The same for the same seed."""
    return [
        _scenario(
            "quiet, then a burst",
            _merged(_steady(Random(seed), 1800, 0.2, 8), _burst(Random(seed + 1), 900, 600, 8)),
            slots=10,
            most=60,
            lasts=1800,
        ),
        _scenario("sawtooth", _sawtooth(Random(seed + 2), teeth=3, period=900, peak=15, takes=5), slots=10, most=60),
        _scenario(
            "long runs",
            _merged(
                _steady(Random(seed + 3), 3600, 0.02, 240, spread=0.3),
                *(_burst(Random(seed + 4 + n), 600 + 1200 * n, 40, 240, spread=0.3) for n in range(2)),
            ),
            slots=1,
            most=200,
        ),
        _scenario(
            "short runs",
            _merged(
                _steady(Random(seed + 7), 1800, 2, 0.5),
                *(_burst(Random(seed + 8 + n), 300 + 600 * n, 3000, 0.5) for n in range(2)),
            ),
            slots=1,
            most=200,
        ),
        _scenario(
            "one-slot workers",
            _merged(
                _steady(Random(seed + 11), 2400, 1, 6),
                *(_burst(Random(seed + 12 + n), 300 + 700 * n, 150 * (n + 1), 6) for n in range(3)),
            ),
            slots=1,
            most=200,
        ),
        _scenario(
            "100-slot workers",
            _merged(
                _steady(Random(seed + 16), 1800, 5, 12),
                *(_burst(Random(seed + 17 + n), 300 + 600 * n, 2500, 12) for n in range(2)),
            ),
            slots=100,
            most=60,
        ),
        _scenario(
            "one in ten takes long",
            _merged(
                _skewed(Random(seed + 20), _steady(Random(seed + 21), 2400, 1, 2), share=0.1, takes=90),
                _skewed(Random(seed + 22), _burst(Random(seed + 23), 900, 300, 2), share=0.1, takes=90),
            ),
            slots=1,
            most=300,
            is_one_kind=False,
        ),
        _scenario(
            "more than the most can do",
            _merged(_steady(Random(seed + 24), 2400, 1, 8), _burst(Random(seed + 25), 300, 4000, 8)),
            slots=10,
            most=5,
        ),
    ]


def _scenario(
    name: str, arrivals: list[Arrival], *, slots: int, most: int, lasts: float = 0, is_one_kind: bool = True
) -> Scenario:
    rules = ScalingRules(slots_per_worker=slots, target_drain_s=TARGET_DRAIN_S, min_workers=1, max_workers=most)
    # Whole milliseconds: what the last digit of a logarithm is, differs between machines.
    exact = tuple(Arrival(round(one.at, 3), round(one.takes, 3)) for one in arrivals)
    return Scenario(name, exact, rules, lasts or exact[-1].at, is_one_kind)


def _takes(random: Random, median: float, spread: float) -> float:
    """Log-normal, as durations of model calls are: some are several times as long as most."""
    return random.lognormvariate(log(median), spread)


def _steady(random: Random, lasts: float, per_s: float, takes: float, spread: float = 0.5) -> list[Arrival]:
    """Runs that know nothing of each other."""

    def moments() -> Iterator[float]:
        at = random.expovariate(per_s)
        while at < lasts:
            yield at
            at += random.expovariate(per_s)

    return [Arrival(at, _takes(random, takes, spread)) for at in moments()]


def _burst(random: Random, at: float, runs: int, takes: float, spread: float = 0.5) -> list[Arrival]:
    """So many within ten seconds."""
    moments = sorted(at + 10 * random.random() for _ in range(runs))
    return [Arrival(moment, _takes(random, takes, spread)) for moment in moments]


def _sawtooth(random: Random, *, teeth: int, period: float, peak: float, takes: float) -> list[Arrival]:
    """More and more, up to `peak` a second, then nearly nothing; again and again. By thinning a steady stream."""
    stream = _steady(random, teeth * period, peak, takes)
    return [arrival for arrival in stream if random.random() < max(0.01, (arrival.at % period) / period)]


def _skewed(random: Random, arrivals: list[Arrival], *, share: float, takes: float) -> list[Arrival]:
    """A share of them takes this long instead."""
    return [Arrival(one.at, takes) if random.random() < share else one for one in arrivals]


def _merged(*streams: list[Arrival]) -> list[Arrival]:
    return sorted((arrival for stream in streams for arrival in stream), key=lambda arrival: arrival.at)
