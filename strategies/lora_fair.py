"""LoRA-FAIR (Bian et al., arXiv 2411.14961) in closed form: the mean of A, and a B that makes up for it.

    A <- mean(A_k)    B <- mean(B_k) + D    D = argmin |M - (mean(B_k) + D) A|^2 + lam |D|^2    M = sum_k p_k B_k A_k
      =>    D = (M - mean(B_k) A) A^T (A A^T + lam I)^-1

The paper minimises 1 - cosine + lam |D|^2 by gradient steps; this is the squared distance, which sees the scale, too, and
is solved at once. It repairs only what lies in the row space of the mean A. Not linear: M needs the factors together.
"""

from __future__ import annotations

import torch
from pydantic import PositiveFloat

from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.fedavg import fedavg


def lora_fair(recipe: Recipe, lam: PositiveFloat = 0.01) -> Strategy:
    """The mean of the factors, B corrected towards the mean of the products; ``lam`` holds it near the mean of the B."""

    def apply(state, round, updates):
        after, trained, weights = factors.together(state, updates)
        for a, b in factors.pairs(state):
            left, right = factors.stack(trained, weights, a, b)
            mean_a, mean_b = after[a].double(), after[b].double()
            gram = mean_a @ mean_a.T
            missing = left @ (right @ mean_a.T) - mean_b @ gram
            ridge = gram + lam * torch.eye(len(gram), dtype=gram.dtype)
            after[b] = (mean_b + torch.linalg.solve(ridge, missing, left=False)).to(state[b].dtype)
        return after

    return fedavg(recipe)._replace(linear=False, init=factors.together_only(recipe), apply=apply)
