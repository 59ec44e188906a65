"""RAVAN (Raje et al., NeurIPS 2025, arXiv 2506.05568): several heads of low rank whose frames are fixed; small cores train.

    q = W_q x + sum_i s_i B_i H_i A_i x        v alike        i = 1 ... heads        A_i (r, d), H_i (r, r), B_i (d, r)

The rows of all A_i together are orthonormal, and so are the columns of all B_i: drawn from (seed, name), the same on every
client, never sent. H_i starts at zero and s_i at one, so that the function is unchanged and H_i has a gradient. A client
folds s_i into H_i before it sends (`fold`), and s_i starts from one again. Frames are the same for all, so the plain mean
(strategy=fedavg) is the mean of products, exactly:    sum_k p_k B_i H_ik A_i = B_i (sum_k p_k H_ik) A_i
Together the heads reach rank heads * r with heads * r^2 numbers. The paper lets weak clients train some of the heads; here
all train all. What travels is ``qkv.{q,v}.lora_r.weight`` (heads, r, r), which is s_i H_i, and the ones in ``lora_r.scale``.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from fl.models import Method, WeightsError
from fl.models.lora import beside, train_only
from fl.randomness import generator


class Heads(nn.Module):
    """x (..., d) -> sum_i s_i B_i H_i A_i x (..., d)."""

    scale = 1.0  # of the whole, to whoever merges it: the heads have their own

    def __init__(self, d: int, heads: int, rank: int, stream: Generator) -> None:
        super().__init__()
        self.lora_r = nn.ParameterDict({"weight": torch.zeros(heads, rank, rank), "scale": torch.ones(heads)})
        self.register_buffer("a", orthonormal(d, heads * rank, stream).T.contiguous(), persistent=False)
        self.register_buffer("b", orthonormal(d, heads * rank, stream), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.factors()
        return linear(linear(x, a), b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """All s_i H_i A_i, one below another (heads * r, d), and all B_i side by side (d, heads * r)."""
        cores = self.lora_r["scale"][:, None, None] * self.lora_r["weight"]
        return (cores @ self.a.view(*cores.shape[:2], -1)).flatten(0, 1), self.b

    @torch.no_grad()
    def fold(self) -> None:
        """H_i <- s_i H_i, s_i <- 1: the same function, in numbers whose mean is the mean of functions."""
        self.lora_r["weight"].mul_(self.lora_r["scale"][:, None, None])
        self.lora_r["scale"].fill_(1.0)


def ravan(heads: PositiveInt = 4, rank: PositiveInt = 8) -> Method:
    """So many ``heads`` of this ``rank``, patch embedding and head."""

    def method(model: nn.Module, seed: int) -> None:
        beside(model, lambda d, *place: Heads(d, heads, rank, generator(seed, "ravan", *place)))
        train_only(model, ("lora_r", "patch_embed", "head"))

    return method


def orthonormal(d: int, columns: int, stream: Generator) -> Tensor:
    """(d, columns) with orthonormal columns, uniform among those; the same on every machine to the last digits of float32.

    Q of a Gaussian draw, in float64, with the signs that give R a positive diagonal. Raises WeightsError where d is too small.
    """
    if columns > d:
        raise WeightsError(f"heads * rank must be at most the model's width {d}, got {columns}; lower method.rank")
    q, r = torch.linalg.qr(torch.randn(d, columns, generator=stream, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()
