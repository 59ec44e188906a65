"""The timing method: candidates run interleaved, and what counts is the median of their paired ratios.

A loaded machine stretches whatever runs at the moment, and neighbours in time alike: ratios hold where seconds do not.
Work of one process is timed by its CPU seconds (``time.process_time``) on one thread; what spans processes, by the wall.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Callable, Mapping, NamedTuple, Sequence

Work = Callable[[], object]
Race = dict[str, list[float]]
"""Seconds of each candidate, one for each repeat; entries of one repeat are neighbours in time."""


class Spread(NamedTuple):
    """The median of paired ratios, the least and the greatest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_short(self.median)}x ({_short(self.low)}-{_short(self.high)})"


def race(candidates: Mapping[str, Work], pairs: int, clock: Callable[[], float] = time.process_time, least: float = 0.02) -> Race:
    """Time the candidates A, B, C / C, B, A / ... ``pairs`` times after a warm-up of each.

    What takes less than ``least`` seconds is repeated until it does not, and its seconds are divided by the repeats.
    """
    turns = {name: _turns(work, clock, least) for name, work in candidates.items()}
    seconds: Race = {name: [] for name in candidates}
    for pair in range(pairs):
        for name in list(candidates)[:: -1 if pair % 2 else 1]:
            seconds[name].append(_seconds(candidates[name], turns[name], clock))
    return seconds


def faster(seconds: Race, name: str, baseline: str) -> Spread:
    """How many times faster than ``baseline`` candidate ``name`` is: baseline's seconds over its own, pair by pair."""
    return spread([b / a for a, b in zip(seconds[name], seconds[baseline], strict=True)])


def spread(ratios: Sequence[float]) -> Spread:
    """The `Spread` of these ratios."""
    return Spread(statistics.median(ratios), min(ratios), max(ratios))


def rate(seconds: Race, name: str, amount: float) -> float:
    """``amount`` of work a second, by the candidate's median."""
    return amount / statistics.median(seconds[name])


def _turns(work: Work, clock: Callable[[], float], least: float) -> int:
    first = _seconds(work, 1, clock)
    return 1 if first >= least else max(1, math.ceil(least / max(_seconds(work, 1, clock), 1e-7)))


def _seconds(work: Work, turns: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(turns):
        work()
    return (clock() - began) / turns


def _short(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"
