"""How long an update may be: some times what honest ones are, each measured in what its own orders can move.

    way       sum of the schedule's shares over the steps of the round, or of one of the ROUNDS before where that is more
    reach     AdamW  sqrt(sum_g n_g (lr_g way)^2)                    a value moves by about its rate in a step
              SGD    max_g lr_g clip way / (1 - momentum)            the gradient is clipped; unclipped it is taken as GREATEST
              both   + max_g lr_g decay way |what was given|         where weights decay
    longest   factor x (median of the admitted |update| / reach) x reach        before there is a median: max(SLACK, factor / 5) x reach

So a client of many images, who takes more steps, and a round of small rates are judged alike. The median is over the last
ROUNDS rounds; of variates that ride along (`strategies.scaffold`), whose reach is GREATEST, there is one apart. What is sent
may be longer than what was trained, since what a codec lost in the rounds before is added to it: as the rates fall towards
the end of a run, that is most of an update, so the way is the longest of some rounds.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple, Sequence

from fl.adapter import Adapter, apart, group, norm
from fl.recipe import Recipe, schedule

GREATEST = 1e3  # the norm of a gradient that nobody clips, at most
SLACK = 2.0     # before there is a median, at least; honest updates are seen below 1
ROUNDS = 5


class Length(NamedTuple):
    """A norm of the weights in a message, and one of the variates that ride along."""

    own: float
    control: float


def reach(recipe: Recipe, given: Adapter, steps: int) -> Length:
    """How far ``steps`` of ``recipe`` from what was ``given`` can lead."""
    sent = apart(recipe.sent(given)).own
    sizes: dict[str, int] = {}
    for name, tensor in sent.items():
        sizes[group(name)] = sizes.get(group(name), 0) + tensor.numel()
    far = way(Schedule(recipe.span, recipe.warmup, recipe.cosine), steps)
    largest = far * max((recipe.lr.get(g, 0.0) for g in sizes), default=0.0)
    if recipe.optimizer == "sgd":
        moved = largest * (recipe.clip or GREATEST) / (1 - recipe.momentum)
    else:
        moved = far * sum(n * recipe.lr.get(g, 0.0) ** 2 for g, n in sizes.items()) ** 0.5
    decayed = largest * recipe.weight_decay * norm(sent) if recipe.weight_decay else 0.0
    return Length(moved + decayed, GREATEST)


class Schedule(NamedTuple):
    """Of a recipe what `fl.recipe.schedule` reads."""

    span: tuple[float, float]
    warmup: float
    cosine: bool


@lru_cache(maxsize=256)  # the clients of a round have a few numbers of steps
def way(rates: Schedule, steps: int) -> float:
    """The sum over ``steps`` of the share of the peak rate: of this round, or of one of the ROUNDS before it where that is more."""
    low, high = rates.span
    starts = [start for k in range(ROUNDS + 1) if (start := low - k * (high - low)) > -1e-9]
    rounds = [rates._replace(span=(max(0.0, start), max(0.0, start) + high - low)) for start in starts]
    return max(sum(schedule(one, step / steps) for step in range(steps)) for one in rounds)


class Lengths:
    """The running medians of a run; ``factor`` is what an update may have of them."""

    def __init__(self, factor: float) -> None:
        self._factor, self._rounds, self._now = factor, [], []

    def longest(self, whole: Length) -> Length:
        """The lengths that an update may have whose reach is ``whole``: one bound for all of a round."""
        seen = [ratios for round in self._rounds for ratios in round]
        middle = Length(*(median(column) for column in zip(*seen))) if seen else Length(0.0, 0.0)
        return Length(*(w * (self._factor * m if m > 0 else max(SLACK, self._factor / 5)) for w, m in zip(whole, middle)))

    def see(self, update: Adapter, whole: Length) -> None:
        """Take note of an admitted ``update``; it counts from the next round on."""
        found = measured(update)
        self._now.append([f / w if w else 0.0 for f, w in zip(found, whole)])

    def begin(self) -> None:
        """Forget what an attempt of this round saw."""
        self._now = []

    def commit(self) -> None:
        """The round is done."""
        self._rounds = [*self._rounds, self._now][-ROUNDS:]
        self._now = []

    def kept(self) -> list[Any]:
        """The part of a checkpoint that holds this memory."""
        return list(self._rounds)

    def recall(self, kept: Sequence[Any]) -> None:
        """Remember what `kept` gave."""
        self._rounds, self._now = [[list(ratios) for ratios in round] for round in kept], []


def measured(update: Adapter) -> Length:
    """How long an ``update`` is, its weights and its variates."""
    parts = apart(update)
    return Length(norm(parts.own), norm(parts.control))
