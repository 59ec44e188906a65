"""Several clients on one frozen base: what trains is theirs, (C, ...), and all else is computed for all of them at once.

    y = [x_1; ...; x_C] W^T + b            one product over the rows of all clients, where W is frozen
    y_c = x_c W_c^T + b_c                  a batch of products, where W is a client's own

With batches of 4 to 32 images a client alone gives a GPU more launches than work, and a CPU thin products. The images of all
lie one behind another, (C n, N, d), and only layers of their own look at whose they are. Since no row meets another client's,
the gradient of the sum of losses is each client's own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fl.adapter import group
from fl.models import WeightsError
from fl.models.lora import LoRAqv, LowRank
from fl.models.lora_sb import WithCore

GROUPS = ("lora_a", "lora_b", "lora_r", "patch_embed", "head")


def stack(model: nn.Module, clients: int) -> nn.Module:
    """A copy of ``model`` for so many ``clients``: what trains is (C, ...), at first C times the model's; the rest is shared.

    `fl.lean.lean` computes it, images (C, n, 3, h, w) to logits (C, n, classes). Raises WeightsError as `check` does.
    """
    check(model)
    pristine = [t for m in model.modules() if isinstance(m, LoRAqv) for t in m.pristine.values()]
    shared = {id(t): t for t in (*model.buffers(), *model.parameters(), *pristine)}
    own = {id(p): nn.Parameter(p.detach().expand(clients, *p.shape).clone()) for p in model.parameters() if p.requires_grad}
    return copy.deepcopy(model, shared | own)  # which takes what is in its memo for copied


def check(model: nn.Module) -> None:
    """Raise WeightsError where more trains than LoRA's factors, patch embedding and head, or factors are of another kind."""
    wide = sorted({group(n) for n, p in model.named_parameters() if p.requires_grad} - set(GROUPS))
    paths = {type(path) for layer in model.modules() if isinstance(layer, LoRAqv) for path in (layer.q, layer.v)}
    strange = f"trains {', '.join(wide)}" if wide else "has LoRA of another kind" if paths - {LowRank, WithCore} else ""
    if strange:
        raise WeightsError(f"clients train together with method=lora_patch|melo|lora_sb|linear, got one that {strange}; set together=1")


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., in) -> (..., out) by a weight (out, in) and bias (out,); with (C, out, in), each C-th of the rows by its own.

    The bias is then (C, out), or (out,) for all.
    """
    if weight.dim() == 2:
        return linear(x, weight, bias)
    rows = x.reshape(len(weight), -1, x.shape[-1])
    return torch.baddbmm(bias if bias.dim() == 1 else bias[:, None], rows, weight.mT).view(*x.shape[:-1], -1)
