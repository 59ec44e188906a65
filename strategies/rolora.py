"""RoLoRA (Chen et al., arXiv 2502.01755): B trains in odd rounds and A in even ones; half of LoRA's bytes go up.

    odd: B <- sum_k p_k B_k, A fixed        even: A <- sum_k p_k A_k, B fixed

One factor is the same for all, so the mean of the other is exact: sum_k p_k B_k A_k = B A. B comes first: while B = 0, A has
no gradient. Two rounds of it are about one round of FedAvg on both. Both factors go down with every round.
"""

from __future__ import annotations

from dataclasses import replace

from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.fedavg import fedavg


def rolora(recipe: Recipe) -> Strategy:
    """`fedavg` of all but A, then of all but B, in turns."""

    def ask(state, round, client):
        return replace(recipe, groups=factors.all_but("lora_a" if round % 2 else "lora_b")), state

    return fedavg(recipe)._replace(init=factors.required, ask=ask)
