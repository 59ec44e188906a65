"""In what units an update is sealed, and its values in the order of the wire.

A narrow word has few steps, so with one each group's values are sealed in units of its scale s: SPREAD times the root mean
square of what the sum before opened to, which all clients know alike; at first FIRST times its learning rate.
"""

from __future__ import annotations

from typing import Mapping

import numpy as np
import torch
from torch import Tensor

from fl.adapter import Adapter, count, group, groups, norm, ordered
from fl.recipe import Recipe
from fl.wire.sealed import Bits

SPREAD, FIRST = 8.0, 4.0


def measured(step: Adapter) -> dict[str, Tensor]:
    """By group, the root mean square of the values of ``step``."""
    parts = {g: {n: t for n, t in step.items() if group(n) == g} for g in groups(step)}
    return {g: torch.tensor(norm(tensors) / count(tensors) ** 0.5) for g, tensors in parts.items()}


def units(scale: Mapping[str, Tensor], recipe: Recipe, bits: Bits, weight: float) -> Mapping[str, float]:
    """By group, what 1 stands for in a sealed value; ``scale`` is what was `measured` of the last step.

    What a client is not to be weighted by its images in, SCAFFOLD's variates, is divided by its ``weight`` beforehand.
    """
    wide = bits == 32
    rates = {g: 1.0 if wide else SPREAD * float(s) or FIRST * recipe.lr.get(g, 0.25) or 1.0 for g, s in scale.items()}
    return {**rates, "control": rates["control"] * weight}


def flat(update: Adapter, unit: Mapping[str, float]) -> np.ndarray:
    """float32 (n,): the values of ``update`` in their units, in the order of the wire."""
    parts = [update[n].detach().reshape(-1).numpy() / np.float32(unit[group(n)]) for n in ordered(update)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def shaped(values: np.ndarray, like: Adapter, unit: Mapping[str, float]) -> Adapter:
    """The inverse of `flat`: ``values``, float32 (n,), with the names and shapes of ``like``."""
    names = ordered(like)
    parts = torch.from_numpy(values).split([like[n].numel() for n in names])
    return {n: p.reshape(like[n].shape) * unit[group(n)] for n, p in zip(names, parts)}
