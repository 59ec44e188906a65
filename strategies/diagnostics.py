"""What a round did to LoRA's factors, as five numbers, over all modules together.

    product_error   |sum_k p_k B_k A_k - mean(B) mean(A)| / |sum_k p_k B_k A_k|      what the mean of factors loses
    best_error      the same for the best product of rank r: what any strategy of rank r must lose
    effective_rank  exp(entropy of S / sum S), S the singular values of sum_k p_k B_k A_k (Roy & Vetterli 2007), mean
    drift           sqrt(sum_k p_k |u_k - u|^2) / |u|, u the mean update, over all tensors: how far clients go apart
    modules         how many products there are

The difference of the first line is sum_k p_k (B_k - mean(B)) (A_k - mean(A)): no cancellation. All is done on the small
cores of `strategies.factors`; a d x d product is never formed.
"""

from __future__ import annotations

import math
from typing import Iterable

import torch

from fl.adapter import Adapter, mean, move, norm, sub
from strategies import Update
from strategies.factors import cores, pairs, stack


def diagnose(given: Adapter, updates: Iterable[Update]) -> dict[str, float]:
    """The numbers above, from what the clients received and their updates; a frozen factor may be missing in these."""
    updates = list(updates)
    weights = [u.examples for u in updates]
    step = mean([u.adapter for u in updates], weights)
    trained, middle = [move(given, u.adapter) for u in updates], move(given, step)
    apart = [sub(t, middle) for t in trained]
    whole = lost = beyond = rank = 0.0
    modules = pairs(given)
    for a, b in modules:
        s = torch.linalg.svdvals(cores(*stack(trained, weights, a, b))[1])
        whole += float(s.square().sum())
        beyond += float(s[len(given[a]) :].square().sum())
        lost += float(cores(*stack(apart, weights, a, b))[1].square().sum())
        rank += effective_rank(s) / len(modules)
    spread = sum(w * norm(sub(u.adapter, step)) ** 2 for u, w in zip(updates, weights)) / sum(weights)
    return {
        "product_error": ratio(math.sqrt(lost), math.sqrt(whole)),
        "best_error": ratio(math.sqrt(beyond), math.sqrt(whole)),
        "effective_rank": rank,
        "drift": ratio(math.sqrt(spread), norm(step)),
        "modules": len(modules),
    }


def effective_rank(s: torch.Tensor) -> float:
    """exp of the entropy of the singular values' shares; 0 for a product that is zero."""
    total = float(s.sum())
    return math.exp(float(torch.special.entr(s / total).sum())) if total > 0 else 0.0


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 where both are."""
    return part / whole if whole else math.inf if part else 0.0
