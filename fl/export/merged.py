"""A plain timm vision transformer with LoRA folded into its layers, as a folder that `timm.create_model("local-dir:...")` reads.

    W_q <- W_q + s * B_q A_q        W_v alike        in float64, then float32
"""

from __future__ import annotations

import copy
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import Tensor, nn

from fl.export.folder import ExportError
from fl.export.restored import Restored
from fl.learn import normalise
from fl.models import Forward
from fl.models.lora import LoRAqv


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose LoRA is in the weights: the same function to rounding, of plain layers alone."""
    whole = copy.deepcopy(model).requires_grad_(False)
    for block in whole.blocks:
        if isinstance(block.attn.qkv, LoRAqv):
            block.attn.qkv = _layer(block.attn.qkv)
    return whole


def write(restored: Restored, folder: Path) -> None:
    """``model.safetensors`` and ``config.json`` as timm writes them. Raises ExportError for a backbone that is not timm's."""
    model = merge(restored.model)
    if not hasattr(model, "asked") or not hasattr(model, "pretrained_cfg"):
        raise ExportError(f"kind=timm needs a backbone that fl.models.vit built, got {type(model).__name__}; choose kind=onnx")
    side, half = restored.reading.image, (0.5, 0.5, 0.5)
    sizes = {"input_size": (3, side, side), "crop_pct": 1.0, "interpolation": "bicubic", "mean": half, "std": half}
    model.pretrained_cfg = {n: v for n, v in dict(model.pretrained_cfg).items() if n != "tag"} | sizes
    save_for_hf(
        model, str(folder), {"label_names": list(restored.reading.classes)}, {**model.asked, "num_classes": model.num_classes},
        safe_serialization=True,
    )


def read(folder: Path) -> nn.Module:
    """The model in a folder that `write` made, by timm alone. Raises ExportError."""
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise ExportError(f"{folder} must hold a model as timm saves it, and cannot be read ({reason}); export it again") from None


def forward(model: nn.Module) -> Forward:
    """uint8 (n, 3, h, w) -> logits (n, classes) by the model itself, with every channel normalised alike."""

    @torch.no_grad()
    def call(images: Tensor) -> Tensor:
        return model(normalise(images)).float()

    return call


def _layer(adapted: LoRAqv) -> nn.Linear:
    d = adapted.weight.shape[1]
    weight = adapted.weight.detach().double()
    for at, path in ((0, adapted.q), (2, adapted.v)):
        a, b = path.factors()
        weight[at * d : (at + 1) * d] += path.scale * b.double() @ a.double()
    layer = nn.Linear(d, len(weight), bias=adapted.bias is not None, device=weight.device)
    layer.weight.copy_(weight.float())
    if adapted.bias is not None:
        layer.bias.copy_(adapted.bias)
    return layer.requires_grad_(False)
