"""How the frozen base has changed from round to round, as the server remembers it: the whole, and its latest steps.

A client that has the base of a round needs the steps since; one that has nothing, or that has missed so many that their
factors outgrow the weights, is sent the whole. So steps that nobody can use are forgotten, and memory stays bounded.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

from fl.adapter import Adapter
from fl.base import grow, is_dense


class Grown(NamedTuple):
    """The ``whole`` change after ``round``, and the last rounds' ``steps``, oldest first, as many as are worth sending."""

    round: int = 0
    whole: Adapter = {}
    steps: tuple[Adapter, ...] = ()


def grown(before: Grown, round: int, step: Adapter) -> Grown:
    """``before`` and the ``step`` of the ``round`` after it."""
    steps = (*before.steps, step)
    while steps and is_dense(reduce(grow, steps, {})):
        steps = steps[1:]
    return Grown(round, grow(before.whole, step), steps)


def lacking(base: Grown, since: int) -> tuple[int, tuple[Adapter, ...]]:
    """The steps after round ``since``, and this round; the whole as one step, and 0, where the steps do not reach back to it."""
    behind = base.round - since
    if not 0 < since <= base.round or behind > len(base.steps):
        return 0, (base.whole,)
    return since, base.steps[len(base.steps) - behind :]
