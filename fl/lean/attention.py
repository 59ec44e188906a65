"""Softmax attention over a fused qkv, two ways: plain products with their own backward, or torch's fused kernel.

    S = Q K^T      P = softmax(S)      O = P V
    dV = P^T dO      dS = P * (dP - rowsum(dP * P)), dP = dO V^T      dQ = dS K      dK = dS^T Q

Q comes scaled: its 1 / sqrt(e) is in the layer's weight, as `fl.lean.merged` makes it. For the 17 to 197 tokens of a ViT the
N x N matrices are small: the plain products beat torch's blockwise kernel in bfloat16 on a CPU by 3 to 6 times, while on a GPU
the fused kernel wins. `fl.lean.choose` measures which.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from fl.lean.packed import has_onednn

Attention = Callable[[Tensor, int], Tensor]
"""``attention(qkv, heads)``: (n, N, 3 d), q (scaled), k and v side by side -> (n, N, d), heads side by side."""
WIDE = 64  # tokens, beyond which oneDNN's softmax is worth the way there and back


def plain(qkv: Tensor, heads: int) -> Tensor:
    """Plain products; P is kept for the backward, so memory grows with n * heads * N^2."""
    return _Plain.apply(qkv, heads)


def fused(qkv: Tensor, heads: int) -> Tensor:
    """torch's scaled_dot_product_attention, whichever kernel it takes."""
    n, tokens, width = qkv.shape
    q, k, v = qkv.view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).reshape(n, tokens, width // 3)


def one_query(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """Attention of a single token: q (n, d), scaled, and kv (n, N, 2 d) -> (n, d)."""
    n, tokens, _ = kv.shape
    k, v = kv.view(n, tokens, 2, heads, -1).unbind(2)                    # (n, N, h, e)
    q = q.view(n, 1, heads, -1)
    weights = (q * k).sum(-1, keepdim=True).softmax(1)
    return (weights * v).sum(1).reshape(n, -1)


ATTENTIONS: dict[str, Attention] = {"fused": fused, "plain": plain}


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis, (..., N) -> (..., N); of many tokens in a CPU's bfloat16 by oneDNN.

    torch asks oneDNN for it only where the tensor is one of that library's, so it goes there and back.
    """
    if scores.dtype == torch.bfloat16 and scores.shape[-1] > WIDE and has_onednn(scores):
        return scores.to_mkldnn().softmax(-1).to_dense()
    return scores.softmax(-1)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, heads: int) -> Tensor:
        n, tokens, width = qkv.shape
        apart = qkv.view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, n * heads, tokens, -1).contiguous()
        q, k, v = apart
        p = softmax(torch.bmm(q, k.mT))
        ctx.save_for_backward(apart, p)
        ctx.heads = heads
        return torch.bmm(p, v).view(n, heads, tokens, -1).transpose(1, 2).reshape(n, tokens, width // 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do: Tensor) -> tuple[Tensor, None]:
        apart, p = ctx.saved_tensors
        (q, k, v), n = apart, do.shape[0]
        do = do.view(n, do.shape[1], ctx.heads, -1).transpose(1, 2).reshape(q.shape)
        ds = torch._softmax_backward_data(torch.bmm(do, v.mT), p, -1, p.dtype)
        d = torch.empty_like(apart)
        torch.bmm(ds, k, out=d[0])
        torch.bmm(ds.mT, q, out=d[1])
        torch.bmm(p.mT, do, out=d[2])
        return d.view(3, n, ctx.heads, *q.shape[1:]).permute(1, 3, 0, 2, 4).reshape(n, q.shape[1], -1), None
