"""The lean step: the timm model's function of the same parameters with less work, one idea a file.

    merged.py       LoRA and attention's scale merged into their layer for the step, with a backward of thin gradients alone
    packed.py       frozen weights laid out once as a CPU's product reads them
    attention.py    attention with its own backward, plain or fused
    heap.py         freed memory kept for the next step
    blocks.py       pictures as the patch embedding multiplies them
    table.py        crop, flip, cipher and that layout composed into one gather
    rows.py         with a resize between them: its two passes, and whole runs of bytes moved
    stacked.py      several clients at once through the base that they share
    compiled.py     all of it as one graph, for a GPU
    choose.py       which precision and which attention are fast on this machine: measured once, then kept

A fourth idea is in this file: the head reads the class token alone, so the last block needs keys and values of all tokens,
but query, projection and MLP of that one. And frozen weights are stored once in the precision of the step, where autocast
would cast them anew in every step. The timm model stays the oracle (``step=plain``): gradients agree to 1e-5 in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from fl.lean.attention import ATTENTIONS, Attention, one_query
from fl.lean.blocks import embedded, levels
from fl.lean.merged import MergedQKV, WholeQKV
from fl.lean.packed import Frozen
from fl.lean.stacked import affine
from fl.models import Forward, WeightsError
from fl.models.lora import LoRAqv


class Block(NamedTuple):
    """The parts of one block; ``qkv`` is the layer as this step computes it."""

    norm1: nn.LayerNorm
    qkv: MergedQKV | WholeQKV
    heads: int
    proj: Frozen
    norm2: nn.LayerNorm
    fc1: Frozen
    fc2: Frozen


def lean(model: nn.Module, precision: str, attention: str) -> Forward:
    """``model`` as a function, uint8 images (n, 3, h, w) -> float32 logits (n, classes), to train and to evaluate with.

    It takes the same images as blocks, too, (n, h / p, w / p, 3, p, p), as `fl.lean.table` and `fl.lean.rows` make them. Of a
    `stacked.stack` of C clients, (C, n, ...) -> (C, n, classes).
    ``precision`` is float32 or bfloat16, ``attention`` plain or fused. In bfloat16 the frozen parameters of ``model`` are
    turned into it in place, those below LoRA excepted; what trains stays float32. Raises WeightsError for a model with
    parts that this step does not know.
    """
    _check(model)
    dtype, attend = getattr(torch, precision), ATTENTIONS[attention]
    masters = {id(m.weight) for m in model.modules() if isinstance(m, LoRAqv)}
    for parameter in model.parameters():
        if not parameter.requires_grad and id(parameter) not in masters:
            parameter.data = parameter.data.to(dtype)
    blocks = [_block(block, dtype) for block in model.blocks]

    def forward(images: Tensor) -> Tensor:
        each = 3 if images.ndim < 6 else 5  # axes of a picture, or of one in blocks
        x = _embed(model, images.flatten(0, -each - 1), dtype)
        for block in blocks[:-1]:
            x = _whole(block, x, attend)
        x = _norm(model.norm, _last(blocks[-1], x))
        return affine(x.float(), model.head.weight, model.head.bias).view(*images.shape[:-each], -1)

    return forward


def _block(block: nn.Module, dtype: torch.dtype) -> Block:
    layer, scale = block.attn.qkv, block.attn.scale
    qkv = MergedQKV(layer, dtype, scale) if isinstance(layer, LoRAqv) else WholeQKV(layer, scale)
    proj, fc1, fc2 = map(Frozen, (block.attn.proj, block.mlp.fc1, block.mlp.fc2))
    return Block(block.norm1, qkv, block.attn.num_heads, proj, block.norm2, fc1, fc2)


def _embed(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (n, 3, h, w), or that in blocks -> tokens (n, 1 + T, d)."""
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    x = levels(images, weight.shape[-1], dtype)
    x = embedded(x, weight.flatten(-3).to(dtype), bias.to(dtype))
    return torch.cat([model.cls_token.to(dtype).expand(len(x), -1, -1), x], dim=1) + model.pos_embed.to(dtype)


def _whole(block: Block, x: Tensor, attend: Attention) -> Tensor:
    return _mlp(block, block.proj(attend(block.qkv.all(_norm(block.norm1, x)), block.heads), x))


def _last(block: Block, x: Tensor) -> Tensor:
    """The last block for the class token: (n, N, d) -> (n, d)."""
    h, x = _norm(block.norm1, x), x[:, 0]
    return _mlp(block, block.proj(one_query(block.qkv.query(h[:, 0]), block.qkv.key_value(h), block.heads), x))


def _mlp(block: Block, x: Tensor) -> Tensor:
    return block.fc2(gelu(block.fc1(_norm(block.norm2, x))), x)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _check(model: nn.Module) -> None:
    """Raise WeightsError unless ``model`` is made of the parts above and no others."""
    block = model.blocks[0]
    if type(block).__name__ != "Block" or not isinstance(model.norm, nn.LayerNorm):
        raise WeightsError("step=lean needs timm's plain blocks and a last LayerNorm; this model has others: set step=plain")
    attn, mlp = block.attn, block.mlp
    extra = (block.ls1, block.ls2, block.drop_path1, block.drop_path2, attn.q_norm, attn.k_norm, attn.norm, mlp.norm)
    known = {
        "pools the class token": model.global_pool == "token" and model.num_prefix_tokens == 1 and not model.no_embed_class,
        "has neither patch drop nor extra norms": not any(map(_acts, (model.patch_drop, model.norm_pre, model.fc_norm))),
        "has no drop path, layer scale or norm inside its blocks": not any(map(_acts, extra)),
        "has a plain GELU": type(mlp.act) is nn.GELU and mlp.act.approximate == "none",
        "has biases everywhere": None not in (attn.qkv.bias, attn.proj.bias, model.patch_embed.proj.bias, model.head.bias),
    }
    for part, holds in known.items():
        if not holds:
            raise WeightsError(f"step=lean needs a vision transformer that {part}; this one does not: set step=plain")


def _acts(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)
