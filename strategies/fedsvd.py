"""FedSVD (Lee et al., arXiv 2505.12805): B trains, and after each round the server turns the factors to the product's axes.

    B <- sum_k p_k B_k        U S V^T = svd(B A)        A <- V^T        B <- U S

Exact: one A for all, and the product has rank r, so that nothing is cut off. The rows of B A lie in the row space of A,
which therefore never changes: under plain SGD the run equals FFA-LoRA from an orthonormal A, in other axes (a test holds
it); Adam, which sees axes, makes the difference.
"""

from __future__ import annotations

from dataclasses import replace

from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.fedavg import fedavg


def fedsvd(recipe: Recipe) -> Strategy:
    """`fedavg` of all but A, the factors re-orthonormalised."""
    averaged = fedavg(replace(recipe, groups=factors.all_but("lora_a")))

    def apply(state, round, updates):
        after = dict(averaged.apply(state, round, updates))
        for a, b in factors.pairs(after):
            axes = factors.svd(after[b].double(), after[a].double(), rank=len(after[a]))
            after[a], after[b] = factors.split(*axes, after[a].dtype)
        return after

    return averaged._replace(init=factors.together_only(recipe, factors.orthonormal), apply=apply)
