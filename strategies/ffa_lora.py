"""FFA-LoRA (Sun et al., arXiv 2403.12313): A stays as it was drawn, B trains; half of LoRA's bytes go up.

    B <- sum_k p_k B_k        and with one A for all    sum_k p_k B_k A = B A: the mean of factors is the mean of products

The update stays in the row space of the first A, so its draw matters: ``orthonormal`` replaces A by orthonormal rows of the
same space, once and with the function unchanged, which no draw can make lopsided. A still goes down with every round.

Clients of different ranks stay exact and linear: client k holds the first r_k rows of the one A, and its B, filled up with
zeros, is one of rank r:    sum_k p_k B_k A[:r_k] = (sum_k p_k [B_k 0]) A
"""

from __future__ import annotations

from dataclasses import replace

from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.fedavg import fedavg


def ffa_lora(recipe: Recipe, orthonormal: bool = True) -> Strategy:
    """`fedavg` of all but A."""
    init = factors.orthonormal if orthonormal else factors.required
    return factors.mixed(fedavg(replace(recipe, groups=factors.all_but("lora_a")))._replace(init=init))
