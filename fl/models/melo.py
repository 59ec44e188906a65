"""MeLo (Zhu et al., arXiv 2311.08236): LoRA on q and v and the head train; the patch embedding stays frozen.

With a keyed start the frozen patch embedding reads encrypted images as the public one reads plain images, and never
leaves home. ViT-B/16, ten classes, rank 4: 147,456 + 7,690 = 155,146 parameters.
"""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt
from torch import nn

from fl.models import Method
from fl.models.lora import attach, train_only


def melo(rank: PositiveInt = 4, alpha: PositiveFloat = 8.0) -> Method:
    """LoRA of this ``rank`` with scale ``alpha / rank``, and the head."""

    def method(model: nn.Module, seed: int) -> None:
        attach(model, rank, alpha, seed)
        train_only(model, ("lora_a", "lora_b", "head"))

    return method
