"""FlexLoRA (Bai et al., arXiv 2402.11505), here with one rank for all: the mean of products, cut back to rank r.

    U S V^T = svd(sum_k p_k B_k A_k)        B <- U_r S_r        A <- V_r^T

The best product of rank r (Eckart-Young), where FedAvg's mean(B_k) mean(A_k) is some product of rank r. It needs each
client's factors together, so it is not linear. What is no factor is averaged.
"""

from __future__ import annotations

from fl.adapter import mean, move
from fl.recipe import Recipe
from strategies import Strategy, factors


def flexlora(recipe: Recipe) -> Strategy:
    """The mean of the clients' products B A, as well as rank r can hold it."""

    def apply(state, round, updates):
        updates = list(updates)
        weights = [u.examples for u in updates]
        after = dict(move(state, mean([u.adapter for u in updates], weights)))
        trained = [move(state, u.adapter) for u in updates]
        for a, b in factors.pairs(state):
            axes = factors.svd(*factors.stack(trained, weights, a, b), rank=len(state[a]))
            after[a], after[b] = factors.split(*axes, state[a].dtype)
        return after

    return Strategy(
        linear=False,
        init=factors.required,
        ask=lambda state, round, client: (recipe, state),
        apply=apply,
        view=lambda state: state,
    )
