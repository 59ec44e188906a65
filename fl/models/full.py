"""Full fine-tuning: everything trains and travels. The yardstick for accuracy and bytes.

It sends the position embedding too, from which images can be read (APRIL, arXiv 2112.14087): a baseline, no advice.
"""

from __future__ import annotations

from torch import nn

from fl.models import Method


def full() -> Method:
    """Every parameter; 86,567,656 for ViT-B/16 with a thousand classes."""

    def method(model: nn.Module, seed: int) -> None:
        model.requires_grad_(True)

    return method
