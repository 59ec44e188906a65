"""FedAvg on adapters (McMahan et al., arXiv 1602.05629, algorithm 1); on LoRA factors known as FedIT (arXiv 2305.05644).

    w <- w + sum_k p_k (w_k - w)        p_k = n_k / sum_j n_j        n_k: training images of client k

The mean of factors is not the mean of products: mean(B_k) mean(A_k) differs from mean(B_k A_k) as clients drift apart.
"""

from __future__ import annotations

from fl.adapter import average, move
from fl.recipe import Recipe
from strategies import Strategy


def fedavg(recipe: Recipe) -> Strategy:
    """The example-weighted mean of the updates, every client under the same ``recipe``."""

    def apply(state, round, updates):
        return move(state, average((u.adapter, u.examples) for u in updates))

    return Strategy(
        linear=True,
        init=lambda adapter: adapter,
        ask=lambda state, round, client: (recipe, state),
        apply=apply,
        view=lambda state: state,
    )
