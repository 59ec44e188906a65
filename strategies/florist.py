"""FLoRIST (Ramesh et al., arXiv 2506.09199), here at most rank r: the mean of products, cut where its energy is reached.

    U S V^T = svd(sum_k p_k B_k A_k)        rank = least j <= r with sum_{i<=j} S_i^2 >= energy sum_i S_i^2

Each module drops the directions on which few clients agree. The messages keep their shape: past the cut B is zero and A
has orthonormal rows, which the next round may use anew. So it saves no bytes here, unlike the paper's, which sends the
cut rank, and never more than r, also unlike the paper's. A client of a rank r_k < r receives the first r_k directions.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.fedavg import fedavg


def florist(recipe: Recipe, energy: Annotated[float, Field(gt=0, le=1)] = 0.95) -> Strategy:
    """The mean of the clients' products B A, each module at the rank that holds this share of its ``energy``."""

    def apply(state, round, updates):
        after, trained, weights = factors.together(state, updates)
        for a, b in factors.pairs(state):
            u, s, vt = factors.svd(*factors.stack(trained, weights, a, b), rank=len(state[a]))
            held = s.square().cumsum(0)
            s[1:][held[:-1] >= energy * held[-1]] = 0  # those before it hold enough already
            after[a], after[b] = factors.split(u, s, vt, state[a].dtype)
        return after

    return factors.mixed(fedavg(recipe)._replace(linear=False, init=factors.together_only(recipe), apply=apply))
