"""Fed-SB (Singhal et al., arXiv 2502.15436) on `fl.models.lora_sb`: fixed factors B and A, and between them R, which trains.

    round 1     B, A train    U S V^T = svd(sum_k p_k B_k R A_k)    B <- U_r    A <- V_r^T    R <- S_r
    then        R trains      R <- sum_k p_k R_k      sum_k p_k B R_k A = B R A: the mean of products, exactly

r^2 numbers a module go up from round 2 on. It departs from the paper in where the frames B and A come from: there from the
SVD of a gradient of full fine-tuning, taken on some client's data before the first round; here from a federated round of
LoRA, so that no client's gradient is needed beforehand, and the frames are of what all the clients of round 1 found. That
round keeps of the mean product what rank r can hold and needs the factors together, so the strategy as a whole is not
declared linear, though every later round is. All factors go down with every round.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fl.adapter import groups
from fl.config import ConfigError
from fl.recipe import Recipe
from strategies import Strategy, factors
from strategies.fedavg import fedavg


def fed_sb(recipe: Recipe) -> Strategy:
    """A round of LoRA to find the frames, then `fedavg` of R; patch embedding and head train in all rounds."""
    averaged = fedavg(recipe)

    def init(adapter):
        if not {"lora_a", "lora_b", "lora_r"} <= set(groups(adapter)):
            raise ConfigError("fed_sb needs a core R between LoRA's factors; choose method=lora_sb or strategy=fedavg")
        return adapter

    def ask(state, round, client):
        still = ("lora_r",) if round == 1 else ("lora_a", "lora_b")
        return replace(recipe, groups=factors.all_but(*still)), state

    def apply(state, round, updates):
        if round > 1:
            return averaged.apply(state, round, updates)
        after, trained, weights = factors.together(state, updates)
        trained = [factors.folded(t) for t in trained]
        for a, b in factors.pairs(trained[0]):
            u, s, vt = factors.svd(*factors.stack(trained, weights, a, b), rank=len(state[a]))
            frames = {a: vt, b: u, a.replace("lora_a", "lora_r"): torch.diag(s[: len(vt)])}
            after |= {name: tensor.to(state[name].dtype) for name, tensor in frames.items()}
        return after

    return averaged._replace(linear=False, init=factors.together_only(recipe, init), ask=ask, apply=apply)
