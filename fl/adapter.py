"""Adapter: the trainable tensors under the model's own names, and the small arithmetic on them.

What trains is said once, by ``requires_grad``; what is sent, averaged, saved and counted is derived from it here.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Iterable, Mapping, Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Adapter = dict[str, Tensor]

PATCH_EMBED = "patch_embed.proj.weight"
GROUPS = ("lora_a", "lora_b", "patch_embed", "head", "backbone")


def group(name: str) -> str:
    """The parameter group of a tensor, one of ``GROUPS``: learning rates, bytes and codecs go by it."""
    parts = name.split(".")
    return next((g for g in GROUPS if g in parts), "backbone")


def read(model: nn.Module) -> Adapter:
    """Copies of the model's trainable parameters, on the CPU."""
    return {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}


def write(model: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    """Set the model's trainable parameters. Raises ValueError naming the first name or shape that does not fit."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    check_like(adapter, own)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(adapter[name])


def check_like(adapter: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless both have the same names, shapes and dtypes."""
    for name in sorted(set(adapter) ^ set(like)):
        raise ValueError(f"adapters must hold the same tensors: {name!r} is {'unexpected' if name in adapter else 'missing'}")
    for name, tensor in adapter.items():
        if tensor.shape != like[name].shape or tensor.dtype != like[name].dtype:
            got, must = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, like[name]))
            raise ValueError(f"{name} must be {must}, got {got}")


def add(a: Adapter, b: Adapter) -> Adapter:
    """a + b, tensor by tensor."""
    check_like(a, b)
    return {n: a[n] + b[n] for n in a}


def sub(a: Adapter, b: Adapter) -> Adapter:
    """a - b, tensor by tensor."""
    check_like(a, b)
    return {n: a[n] - b[n] for n in a}


def mean(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """``sum_k p_k a_k`` with ``p_k = w_k / sum(w)``, added in the order given.

    Raises ValueError for no adapters (the mean of nothing is no zero), and for weights that are negative or all zero.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"a mean needs adapters and a weight for each, got {len(adapters)} and {len(weights)}")
    total = float(sum(weights))
    if not 0 < total < math.inf or min(weights) < 0:
        raise ValueError(f"weights must be >= 0 with a positive, finite sum, got {list(weights)}")
    for other in adapters[1:]:
        check_like(other, adapters[0])
    result = {n: t * (weights[0] / total) for n, t in adapters[0].items()}
    for adapter, weight in zip(adapters[1:], weights[1:]):
        for name, tensor in adapter.items():
            result[name].add_(tensor, alpha=weight / total)
    return result


def norm(adapter: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all values together, in float64."""
    return sum(float(t.double().square().sum()) for t in adapter.values()) ** 0.5


def norms(adapter: Mapping[str, Tensor]) -> dict[str, float]:
    """`norm` of each group that is present."""
    return {g: norm({n: t for n, t in adapter.items() if group(n) == g}) for g in groups(adapter)}


def groups(names: Iterable[str]) -> list[str]:
    """The groups present, in the order of ``GROUPS``."""
    present = {group(n) for n in names}
    return [g for g in GROUPS if g in present]


def count(adapter: Mapping[str, Tensor]) -> int:
    """How many parameters."""
    return sum(t.numel() for t in adapter.values())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits of SHA-256 over names, dtypes, shapes and little-endian values, in the order of the names."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return state.hexdigest()[:16]


def save(adapter: Mapping[str, Tensor], path: Path) -> None:
    """Write ``path`` (safetensors) whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({n: t.contiguous() for n, t in adapter.items()}, fresh)
    os.replace(fresh, path)


def load(path: Path) -> Adapter:
    """The adapter that `save` wrote."""
    return load_file(path)
