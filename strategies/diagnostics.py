"""What a round did to LoRA's factors, as five numbers, over all modules together.

    product_error   |sum_k p_k B_k A_k - mean(B) mean(A)| / |sum_k p_k B_k A_k|      what the mean of factors loses
    best_error      the same for the best product of rank r: what any strategy of rank r must lose
    effective_rank  exp(entropy of S / sum S), S the singular values of sum_k p_k B_k A_k (Roy & Vetterli 2007), mean
    drift           sqrt(sum_k p_k |u_k - u|^2) / |u|, u the mean update, over all tensors: how far clients go apart
    modules         how many products there are; without any that the server sees, there is only drift

The difference of the first line is sum_k p_k (B_k - mean(B)) (A_k - mean(A)): no cancellation. All is done on the small
cores of `strategies.factors`; a d x d product is never formed. Factors of a lesser rank are filled up with zeros, which
leaves their products; r is the largest rank of the round. Of B R A the factors are B and R A.
"""

from __future__ import annotations

import math
from typing import Sequence

import torch

from fl.adapter import Adapter, group, mean, move, norm, sub
from strategies import Update
from strategies.factors import at_rank, core, folded, pairs, rank_of, stack


def diagnose(answers: Sequence[tuple[Adapter, Update]]) -> dict[str, float]:
    """The numbers above, from what each client received and its update; a frozen factor may be missing in this."""
    weights = [u.examples for _, u in answers]
    rank = max((rank_of(received) or 0 for received, _ in answers), default=0) or None
    answers = [(at_rank(received, rank), u._replace(adapter=at_rank(u.adapter, rank))) for received, u in answers]
    step = mean([u.adapter for _, u in answers], weights)
    far = sum(w * norm(sub(u.adapter, step)) ** 2 for w, (_, u) in zip(weights, answers)) / sum(weights)
    drift = finite({"drift": ratio(math.sqrt(far), norm(step))})
    if not {"lora_a", "lora_b"} <= {group(name) for name in answers[0][0]}:  # without factors, or with some that stay at home
        return drift
    trained = [folded(move(received, u.adapter)) for received, u in answers]
    middle = mean(trained, weights)
    apart = [sub(t, middle) for t in trained]
    whole = lost = beyond = effective = 0.0
    modules = pairs(trained[0])
    for a, b in modules:
        s = torch.linalg.svdvals(core(*stack(trained, weights, a, b)))
        whole += float(s.square().sum())
        beyond += float(s[len(trained[0][a]) :].square().sum())
        lost += float(core(*stack(apart, weights, a, b)).square().sum())
        effective += effective_rank(s) / len(modules)
    return drift | finite({
        "product_error": ratio(math.sqrt(lost), math.sqrt(whole)),
        "best_error": ratio(math.sqrt(beyond), math.sqrt(whole)),
        "effective_rank": effective,
        "modules": len(modules),
    })  # fmt: skip


def finite(numbers: dict[str, float]) -> dict[str, float]:
    """Of these ``numbers`` those that are some: the ratio to nothing is left out, since no JSON holds it."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def effective_rank(s: torch.Tensor) -> float:
    """exp of the entropy of the singular values' shares; 0 for a product that is zero."""
    total = float(s.sum())
    return math.exp(float(torch.special.entr(s / total).sum())) if total > 0 else 0.0


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 where both are."""
    return part / whole if whole else math.inf if part else 0.0
