"""Geometric median (Pillutla et al., RFA, arXiv 1912.13445): the point with the least sum of distances to the updates.

    z <- sum_k w_k u_k / sum_k w_k        w_k = 1 / max(|u_k - z|, floor)        from the mean, some times (Weiszfeld)

Fewer than half of the clients cannot carry it far from the others. All tensors of an update together are one point, so
that the largest ones decide. RFA weighs by images; here every client counts the same, since that number is its own word.
Each step is a weighted sum, as RFA says, but of weights that only who sees the updates can tell: not linear.
"""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from fl.adapter import mean, move, norm, sub
from fl.recipe import Recipe
from strategies import Strategy
from strategies.fedavg import fedavg


def geometric_median(recipe: Recipe, steps: PositiveInt = 20, floor: PositiveFloat = 1e-6) -> Strategy:
    """The geometric median of the updates after so many Weiszfeld ``steps``; ``floor`` keeps a weight finite."""

    def apply(state, round, updates):
        sent = [u.adapter for u in updates]
        centre = mean(sent, [1] * len(sent))
        for _ in range(steps):
            centre = mean(sent, [1 / max(norm(sub(a, centre)), floor) for a in sent])
        return move(state, centre)

    return fedavg(recipe)._replace(linear=False, apply=apply)
