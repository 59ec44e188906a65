"""LoRA as Hugging Face's peft reads it, without peft: q and v together are one exact adapter on the fused ``qkv`` of twice the rank.

    A = [A_q; A_v]  (2 r, d)        B (3 d, 2 r): B_q in rows 0:d and columns 0:r, B_v in rows 2d:3d and columns r:2r, else 0
    peft adds lora_alpha / (2 r) * B A, so that lora_alpha = 2 r s keeps the scale s = alpha / r

The patch embedding, where it trains, and the head go whole, as peft's ``modules_to_save``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fl.export.folder import ExportError
from fl.export.restored import Restored
from fl.models.lora import LoRAqv

WHOLE = ("patch_embed.proj", "head")  # what trains beside LoRA, module by module
PREFIX = "base_model.model."


def write(restored: Restored, folder: Path) -> None:
    """``adapter_model.safetensors`` and ``adapter_config.json``. Raises ExportError for what no LoRA adapter can hold."""
    tensors, settings = fused(restored.model)
    if restored.based:
        raise ExportError("kind=peft cannot hold a change of the frozen weights, which this strategy makes; choose kind=timm, the merged model")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    name = base_name(restored)
    settings["base_model_name_or_path"] = name if name.startswith("timm/") else None  # peft asks the Hub about any name
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def fused(model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """The adapter of ``model`` under peft's names, and peft's settings. Paths of less than the largest rank are filled with zeros."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRAqv)}
    if not layers:
        raise ExportError("kind=peft needs a method with LoRA factors, and this one has none; choose kind=timm, the merged model")
    factors = {n: (layer.q.factors(), layer.v.factors()) for n, layer in layers.items()}
    rank = max(len(a) for pair in factors.values() for a, _ in pair)
    scale = next(iter(layers.values())).q.scale
    tensors = {}
    for name, pair in factors.items():
        d = pair[0][0].shape[1]
        a, b = torch.zeros(2 * rank, d), torch.zeros(3 * d, 2 * rank)
        for at, column, (small_a, small_b) in ((0, 0, pair[0]), (2 * d, rank, pair[1])):
            a[column : column + len(small_a)] = small_a.detach()
            b[at : at + d, column : column + len(small_a)] = small_b.detach()
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and n.rpartition(".")[0] in WHOLE}
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": 2 * rank,
        "lora_alpha": 2 * rank * scale,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["qkv"],
        "modules_to_save": [module for module in WHOLE if f"{module}.weight" in trained],
    }
    return tensors | {f"{PREFIX}{n}": p for n, p in trained.items()}, settings


@torch.no_grad()
def read(folder: Path, base: nn.Module) -> nn.Module:
    """``base``, a fresh backbone, with the adapter in ``folder`` added to its weights, as peft's ``merge_and_unload`` does."""
    tensors = {n.removeprefix(PREFIX): t for n, t in load_file(folder / "adapter_model.safetensors").items()}
    settings = json.loads((folder / "adapter_config.json").read_text())
    state = base.state_dict()
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        product = tensors.pop(f"{module}.lora_B.weight").double() @ tensors.pop(name).double()
        state[f"{module}.weight"].add_(settings["lora_alpha"] / settings["r"] * product)
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    return base


def base_name(restored: Restored) -> str:
    """What the backbone is called: on the Hub where its weights are from there, else by the config, without any path."""
    config = restored.config.model
    name = config.get("name") or config["_target_"].rpartition(".")[2]
    return f"timm/{name}" if config.get("weights") == "hub" else name
