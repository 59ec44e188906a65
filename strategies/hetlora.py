"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): factors of different ranks, filled up with zeros and weighed by size.

    client k receives A[:r_k], B[:, :r_k]        A <- sum_k w_k [A_k; 0]    B <- sum_k w_k [B_k 0]
    w_k = |B_k A_k| / sum_j |B_j A_j|            |B A|^2 = tr(B^T B A A^T)   (Frobenius, from r x r matrices)

Weights are taken module by module; what is no factor is weighed by examples, as factors are while all products are zero.
The zeros dilute: of a direction that one client of weight w holds, w^2 of its product remains (`rbla` mends that). Rows that
no client of the round holds stay as they are, where the paper's zeros would end them. Left out is the paper's pruning of a
client's own rank (a penalty on its last rows, and a lower rank when they shrink): ranks here are the nodes' settings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.fedavg import fedavg


def hetlora(recipe: Recipe) -> Strategy:
    """The mean of the factors filled up with zeros, a client's weight in each module being the norm of its product."""

    def apply(state, round, updates):
        updates = list(updates)
        held = max((factors.rank_of(u.adapter) for u in updates), default=None)
        top = factors.at_rank(state, held)
        after, trained, examples = factors.together(top, factors.widened(top, updates))
        for a, b in factors.pairs(state):
            sizes = [product_norm(t[a], t[b]) for t in trained]
            weights = sizes if any(sizes) else examples
            for name, axis in ((a, 0), (b, 1)):
                found = sum(w * t[name] for w, t in zip(weights, trained)) / sum(weights)
                after[name] = torch.cat([found, state[name].narrow(axis, held, state[name].shape[axis] - held)], axis)
        return after

    init = factors.together_only(recipe)
    return factors.mixed(fedavg(recipe)._replace(linear=False, init=init, apply=apply), wide=False)


def product_norm(a: Tensor, b: Tensor) -> float:
    """|B A|, from r x r matrices alone."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())
