"""FedRot-LoRA (Zhang et al., arXiv 2602.23638), by A in full: factors are turned into one frame before the mean.

    U S V^T = svd(A A_k^T)     R_k = V U^T = argmin |R^T A_k - A|     A <- sum_k p_k R_k^T A_k     B <- sum_k p_k B_k R_k

(B R)(R^T A) = B A: a client's product stays, the mean loses less to frames that drifted apart. A is the previous global
one. The paper's clients rotate before they send, in turns by A and by B, and part of the way; here the server does it, by A
and in full, so the clients stay as they are and the strategy is not linear. R may reflect.
"""

from __future__ import annotations

import torch

from fl.adapter import average, move
from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.fedavg import fedavg


def fedrot_lora(recipe: Recipe) -> Strategy:
    """The mean of the clients' factors, each turned towards the A that the clients received."""

    def turned(state, update):
        after = dict(move(state, update))
        for a, b in factors.pairs(state):
            u, _, vt = torch.linalg.svd((state[a] @ after[a].T).double())
            rotation = (vt.T @ u.T).to(state[a].dtype)
            after[a], after[b] = rotation.T @ after[a], after[b] @ rotation
        return after

    def apply(state, round, updates):
        return average((turned(state, u.adapter), u.examples) for u in updates)

    return fedavg(recipe)._replace(linear=False, init=factors.together_only(recipe), apply=apply)
