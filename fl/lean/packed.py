"""Frozen layers on a CPU: weights laid out once as its product reads them, bias and residual added before the result is written.

    y = x W^T + b (+ r)        dx = dy W        dr = dy

torch's `linear` has oneDNN lay the weight out anew in every product, writes the bias into the result before the product and
reads both again after it to add a residual. torch's own compiler calls the operations used here; they have no public name, so
where they are missing, and on a GPU, the same is said in the usual words. The layouts for forward and backward are two more
copies of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import linear
from torch.utils.weak import WeakTensorKeyDictionary

NEEDED = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
KNOWN: tuple[torch.dtype, ...] = ()  # in which this machine's torch can do so
if torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in NEEDED):
    if hasattr(torch.ops.mkldnn._linear_pointwise, "binary"):
        KNOWN = (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
_KEPT = WeakTensorKeyDictionary()


class Frozen:
    """A linear layer that does not train, in the dtype of its weight; one that trains is asked as it is.

    What is frozen is read here, once: its values must not change afterwards.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, weight = layer, layer.weight.detach()
        self.packed = has_onednn(weight) and not any(p.requires_grad for p in layer.parameters())
        if self.packed:
            self.along, self.back = _packed(layer.weight)
            self.bias = layer.bias.detach().clone()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., in) and what is added to the result (..., out) -> (..., out)."""
        if self.packed:
            return _Frozen.apply(x, residual, self.along, self.back, self.bias)
        y = linear(x, self.layer.weight.to(x.dtype), self.layer.bias.to(x.dtype))
        return y if residual is None else residual + y


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + b + r without gradients: x (..., in), ``weight`` (out, in) packed or not, r (..., out)."""
    if not has_onednn(x):
        y = linear(x, weight, bias)
        return y if residual is None else y + residual
    rows = x.reshape(-1, x.shape[-1])
    if residual is None:
        y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    else:
        y = torch.ops.mkldnn._linear_pointwise.binary(rows, residual.reshape(len(rows), -1), weight, bias, "add")
    return y.view(*x.shape[:-1], -1)


def has_onednn(tensor: Tensor) -> bool:
    """Whether this machine's torch has oneDNN for a tensor of this device and dtype."""
    return tensor.device.type == "cpu" and tensor.dtype in KNOWN


def _packed(weight: nn.Parameter) -> tuple[Tensor, Tensor]:
    """A frozen weight as forward and backward read it, once however many stacks of clients share it."""
    state = weight.data_ptr(), weight.dtype, weight._version
    if _KEPT.get(weight, (None,))[0] != state:
        ways = (weight.detach(), weight.detach().T.contiguous())
        _KEPT[weight] = state, tuple(map(torch.ops.mkldnn._reorder_linear_weight, ways))
    return _KEPT[weight][1]


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, residual: Tensor | None, along: Tensor, back: Tensor, bias: Tensor) -> Tensor:
        ctx.back = back
        return product(x, along, bias, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = product(dy, ctx.back) if ctx.needs_input_grad[0] else None
        return dx, dy if ctx.needs_input_grad[1] else None, None, None, None
