"""LoRA-SB (Ponkshe et al., arXiv 2411.19557), which Fed-SB (arXiv 2502.15436) trains: a small square R between LoRA's factors.

    q = W_q x + s * B_q R_q A_q x        v alike        s = alpha / rank        A (r, d), R (r, r), B (d, r)

R starts as the identity and B at zero, so that it is LoRA at first and the function is unchanged. Which of the three train
is for the strategy to say in each round: `strategies.fed_sb` finds A and B in the first and trains R alone from then on,
r^2 numbers in each place. The factors are ``qkv.{q,v}.lora_{a,b,r}.weight``.
"""

from __future__ import annotations

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import linear

from fl.models import Method
from fl.models.lora import beside, first_draw, train_only
from fl.randomness import generator


class WithCore(nn.Module):
    """x (..., d) -> s * B R A x (..., d)."""

    def __init__(self, d: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.lora_a = nn.Linear(d, rank, bias=False)
        self.lora_r = nn.Linear(rank, rank, bias=False)
        self.lora_b = nn.Linear(rank, d, bias=False)
        torch.nn.init.eye_(self.lora_r.weight)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.factors()
        return self.scale * linear(linear(x, a), b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """R A (rank, d) and B (d, rank): a path of low rank to whoever merges it, with gradients through R A."""
        return self.lora_r.weight @ self.lora_a.weight, self.lora_b.weight


def lora_sb(rank: PositiveInt = 16, alpha: PositiveFloat = 32.0) -> Method:
    """B R A of this ``rank`` with scale ``alpha / rank``, patch embedding and head."""

    def method(model: nn.Module, seed: int) -> None:
        beside(model, lambda d, *place: first_draw(WithCore(d, rank, alpha), generator(seed, "lora", *place)))
        train_only(model, ("lora_a", "lora_b", "lora_r", "patch_embed", "head"))

    return method
