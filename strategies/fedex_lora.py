"""FedEx-LoRA (Singhal et al., arXiv 2410.09432): the mean of factors, and what it loses goes into the frozen base.

    A <- mean(A_k),  B <- mean(B_k),  W <- W + s R,  R = sum_k p_k B_k A_k - mean(B) mean(A)

Exact: W + s B A becomes the mean of the clients' W + s B_k A_k. The residual has rank (K - 1) r, and as many columns: since
sum_k p_k (B_k - mean(B)) = 0, one may take any client's A away from all, and the last one's leaves K - 1 terms,

    R = sum_k p_k (B_k - mean(B)) (A_k - mean(A)) = sum_{k<K} (B_k - mean(B)) p_k (A_k - A_K)

The scale s is the same for all and is applied by the client, as it is to B A. What is no factor is averaged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fl.adapter import Adapter, mean, move
from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.grown import Grown, grown, lacking


class FedEx(NamedTuple):
    """The mean adapter, and how the base has changed."""

    adapter: Adapter
    base: Grown = Grown()


def fedex_lora(recipe: Recipe) -> Strategy:
    """`fedavg`, made exact by the residual."""

    def apply(state: FedEx, round, updates):
        updates = list(updates)
        weights = [u.examples for u in updates]
        after = move(state.adapter, mean([u.adapter for u in updates], weights))
        *others, last = (move(state.adapter, u.adapter) for u in updates)
        step = {}
        for a, b in factors.pairs(after) if others else ():
            rows = [w / sum(weights) * (t[a].double() - last[a].double()) for w, t in zip(weights, others)]
            columns = [t[b].double() - after[b].double() for t in others]
            step[a], step[b] = torch.cat(rows).to(after[a].dtype), torch.cat(columns, dim=1).to(after[b].dtype)
        return FedEx(after, grown(state.base, round, step))

    return Strategy(
        linear=False,
        init=factors.together_only(recipe, lambda adapter: FedEx(factors.required(adapter))),
        ask=lambda state, round, client: (recipe, state.adapter),
        apply=apply,
        view=lambda state: state.adapter,
        base=lambda state, since: lacking(state.base, since),
    )
