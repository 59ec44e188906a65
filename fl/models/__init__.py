"""Backbones and the methods that adapt them, one file each.

A backbone file holds a builder ``(image, patch, classes, ...) -> nn.Module`` with timm's own parameter names; a method
file holds a builder ``(...) -> Method``. ``conf/model`` and ``conf/method`` name them.
"""

from __future__ import annotations

from typing import Callable

from torch import Tensor, nn

Method = Callable[[nn.Module, int], None]
"""``method(model, seed)`` adds what it adds and sets ``requires_grad``: true for what trains and travels, else false."""

Forward = Callable[[Tensor], Tensor]
"""``forward(images)``: uint8 (n, 3, h, w), as the cipher leaves them -> float32 logits (n, classes); the model as a function."""


def fold(model: nn.Module) -> None:
    """Bring ``model``, its function unchanged, into the form in which it is sent, after training.

    A part that trains in more numbers than are to be averaged, as a scale and what it scales, has a ``fold`` of its own.
    """
    for part in model.modules():
        getattr(part, "fold", lambda: None)()


class WeightsError(ValueError):
    """Pretrained weights that cannot be had or do not fit; the message names the way out."""
