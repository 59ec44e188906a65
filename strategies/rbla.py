"""RBLA (Chen et al., arXiv 2408.08699): each rank's row and column is averaged over the clients that hold it.

    A[j] <- A[j] + sum_k n_k (A_k[j] - A[j]) / sum_k n_k      over the clients k with r_k > j;  B's columns alike

So what strong clients alone can learn is not diluted by the zeros of weak ones, as in plain zero-padding. A row that no
client of the round holds stays. Still a mean of factors, not of products. The divisors differ by row, so it is not declared
linear; with one rank for all it is `fedavg`.
"""

from __future__ import annotations

import torch

from fl.adapter import mean, move
from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.fedavg import fedavg


def rbla(recipe: Recipe) -> Strategy:
    """The mean of the factors, row by row of A and column by column of B, over those that have them."""

    def apply(state, round, updates):
        updates, rank = list(updates), factors.rank_of(state)
        weights = [u.examples for u in updates]
        step = mean([factors.at_rank(u.adapter, rank) for u in updates], weights)
        held = mean([factors.at_rank({n: torch.ones_like(t) for n, t in u.adapter.items()}, rank) for u in updates], weights)
        return move(state, {n: step[n] / held[n].clamp(min=1e-30) for n in step})

    init = factors.together_only(recipe)
    return factors.mixed(fedavg(recipe)._replace(linear=False, init=init, apply=apply), wide=False)
