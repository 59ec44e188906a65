"""FlexLoRA (Bai et al., arXiv 2402.11505): the mean of products, cut back to rank r; each client receives it at its own rank.

    U S V^T = svd(sum_k p_k B_k A_k)        B <- U_r S_r        A <- V_r^T        client k: U_{r_k} S_{r_k}, V_{r_k}^T

The best product of rank r, and of each client's rank r_k <= r, since singular values are sorted (Eckart-Young), where
FedAvg's mean(B_k) mean(A_k) is some product of rank r. It needs each client's factors together, so it is not linear. What
is no factor is averaged. What only clients of small weight can hold fades: a direction that one client of weight p knows
returns to it with p of its size.
"""

from __future__ import annotations

from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.fedavg import fedavg


def flexlora(recipe: Recipe) -> Strategy:
    """The mean of the clients' products B A, as well as rank r can hold it."""

    def apply(state, round, updates):
        after, trained, weights = factors.together(state, updates)
        for a, b in factors.pairs(state):
            axes = factors.svd(*factors.stack(trained, weights, a, b), rank=len(state[a]))
            after[a], after[b] = factors.split(*axes, state[a].dtype)
        return after

    return factors.mixed(fedavg(recipe)._replace(linear=False, init=factors.together_only(recipe), apply=apply))
