"""The paper's proposal (arXiv 2507.11943): LoRA on q and v, the patch embedding and the head train; the rest is frozen.

Encrypted patches are permutations of plain ones, and a permutation is a full-rank change that LoRA cannot make:
so the patch embedding trains whole. ViT-B/16, ten classes, rank 4: 147,456 + 590,592 + 7,690 = 745,738 parameters.
"""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt
from torch import nn

from fl.models import Method
from fl.models.lora import attach, train_only


def lora_patch(rank: PositiveInt = 4, alpha: PositiveFloat = 8.0) -> Method:
    """LoRA of this ``rank`` with scale ``alpha / rank``, patch embedding and head."""

    def method(model: nn.Module, seed: int) -> None:
        attach(model, rank, alpha, seed)
        train_only(model, ("lora_a", "lora_b", "patch_embed", "head"))

    return method
