"""LoRA merged into its layer for one step: one product forward, thin products backward.

    W'_i = c_i (W_i + s_i B_i A_i)  on the rows i of the output        y = x W'^T + c b
    dx = dy W'      dB_i = c_i s_i dy_i^T (x A_i^T)      dA_i = c_i s_i (dy_i B_i)^T x

A branch beside the layer reads and writes every activation once more, and plain autograd through W' would form the whole
d x d gradient of W only to thin it out again; this does neither. A path says what its A and B are (``factors``); where they
are made of others, as R A is, autograd goes on from them. In bfloat16 W' is rounded once, from a float32 sum: added in
bfloat16, a product B A of a thousandth of W is lost by half, of a ten-thousandth altogether. c is attention's
1 / sqrt(e) on the rows of q, and 1 elsewhere: merged, too, it takes no pass over the activations. With factors of C clients,
(C, ...), W' is (C, 3 d, d), and a C-th of the rows of x goes through each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import linear

from fl.lean.packed import product
from fl.lean.stacked import affine
from fl.models.lora import LoRAqv


class MergedQKV:
    """A layer with LoRA on q and v as one matrix W' (3 d, d), merged anew whenever gradients or values may have changed.

    The layer's own weight is the float32 master; W' stands in a buffer of the step's precision. ``scale`` is q's.
    """

    def __init__(self, layer: LoRAqv, dtype: torch.dtype, scale: float) -> None:
        self.layer, self.d = layer, layer.weight.shape[1]
        clients = layer.q.factors()[0].shape[:-2]  # () or (C,): each has its own W' then
        self.merged = layer.weight.detach().to(dtype).repeat(*clients, 1, 1)
        self.bias = _scaled(layer.bias.detach(), self.d, scale).to(dtype)
        self.parts = (0, layer.q, scale), (2, layer.v, 1.0)  # its place, LoRA, c

    def all(self, x: Tensor) -> Tensor:
        """x (..., d) -> q, scaled, k and v side by side (..., 3 d)."""
        self._merge()
        return self._rows(x, 0, 3)

    def query(self, x: Tensor) -> Tensor:
        """x (..., d) -> q, scaled, (..., d); `key_value` is to follow in the same step."""
        self._merge()
        return self._rows(x, 0, 1)

    def key_value(self, x: Tensor) -> Tensor:
        """x (..., d) -> k and v side by side (..., 2 d), with W' as `query` left it."""
        return self._rows(x, 1, 3)

    def _merge(self) -> None:
        with torch.no_grad():
            for at, part, c in self.parts:
                rows, (a, b) = slice(at * self.d, (at + 1) * self.d), part.factors()
                add = torch.addmm if a.dim() == 2 else torch.baddbmm
                self.merged[..., rows, :] = add(self.layer.weight[rows], b, a, beta=c, alpha=c * part.scale)

    def _rows(self, x: Tensor, first: int, last: int) -> Tensor:
        rows = slice(first * self.d, last * self.d)
        parts = [(at - first, part, c * part.scale) for at, part, c in self.parts if first <= at < last]
        places = [(slice(at * self.d, (at + 1) * self.d), scale) for at, _, scale in parts]
        factors = [t for _, part, _ in parts for t in part.factors()]
        weight, bias = self.merged[..., rows, :], self.bias[rows]
        if not torch.is_grad_enabled():  # Dynamo would call a forward of two factors without its ctx (torch 2.14)
            return _forward(x, weight, bias)
        return _Merged.apply(x, weight, bias, places, *factors)


class WholeQKV:
    """A layer without LoRA behind the same three methods; where it does not train, its values are read here, once."""

    def __init__(self, layer: nn.Linear, scale: float) -> None:
        self.layer, self.d, self.scale = layer, layer.in_features, scale
        frozen = not any(p.requires_grad for p in layer.parameters())
        self.kept = [t.detach() for t in self._values()] if frozen else None

    def all(self, x: Tensor) -> Tensor:
        """x (..., d) -> q, scaled, k and v side by side (..., 3 d)."""
        return self._rows(x, slice(None))

    def query(self, x: Tensor) -> Tensor:
        """x (..., d) -> q, scaled, (..., d)."""
        return self._rows(x, slice(self.d))

    def key_value(self, x: Tensor) -> Tensor:
        """x (..., d) -> k and v side by side (..., 2 d)."""
        return self._rows(x, slice(self.d, None))

    def _rows(self, x: Tensor, rows: slice) -> Tensor:
        weight, bias = (t[rows].to(x.dtype) for t in self.kept or self._values())
        return linear(x, weight, bias)

    def _values(self) -> list[Tensor]:
        return [_scaled(t, self.d, self.scale) for t in (self.layer.weight, self.layer.bias)]


def _scaled(rows: Tensor, d: int, scale: float) -> Tensor:
    """The rows of q, k and v (3 d, ...) with q's ``scale`` times as large."""
    return torch.cat([rows[:d] * scale, rows[d:]])


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W'^T + b; a W' of C clients (C, ...) takes a C-th of the rows of x each."""
    return product(x, weight, bias) if weight.dim() == 2 else affine(x, weight, bias)


class _Merged(torch.autograd.Function):
    """y = x W'^T + b, with gradients for x and for A_i, B_i on the output's ``places`` (rows, scale)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, places: list[tuple[slice, float]], *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.weight, ctx.places = weight, places  # a buffer that the next step writes, after this step's backward
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        rows_in, rows_out = (t.reshape(*ctx.weight.shape[:-2], -1, t.shape[-1]) for t in (x, dy))
        dx = (rows_out @ ctx.weight).view(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.places:
            return dx, None, None, None
        a, b = ([t.to(x.dtype) for t in half] for half in (factors[::2], factors[1::2]))
        ranks = [t.shape[-2] for t in a]
        grads: list[Tensor | None] = [None] * len(factors)
        needs = ctx.needs_input_grad[-len(factors) :]  # one half of the factors may be frozen
        if any(needs[::2]):  # by rows of rank r, which a CPU multiplies faster than columns
            outer = torch.cat([t.mT @ rows_out[..., rows].mT for (rows, _), t in zip(ctx.places, b)], dim=-2)  # (dy B)^T
            da = (outer @ rows_in).float().split(ranks, dim=-2)
            grads[::2] = [scale * g for (_, scale), g in zip(ctx.places, da)]
        if any(needs[1::2]):
            inner = (torch.cat(a, dim=-2) @ rows_in.mT).split(ranks, dim=-2)  # (x A^T)^T of all factors in one pass over x
            grads[1::2] = [scale * (u @ rows_out[..., rows]).mT.float() for (rows, scale), u in zip(ctx.places, inner)]
        return dx, None, None, None, *grads
