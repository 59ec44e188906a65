"""Any timm vision transformer by name, at any image and patch size, with a fresh head.

The head starts at zero: every client has the same one without a word about it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import timm
import torch
from pydantic import Field, PositiveInt
from timm.models import VisionTransformer
from torch import nn

from fl.models import WeightsError
from fl.randomness import derive

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)?$")]
"""A model of timm's own; timm would also read a folder (``local-dir:``) or another's repository (``hf-hub:``)."""


def vit(
    name: Name, image: PositiveInt, patch: PositiveInt, classes: PositiveInt, weights: str = "hub", **shape: int
) -> nn.Module:
    """timm's model ``name`` for ``image`` x ``image`` pictures in ``patch`` x ``patch`` patches.

    ``weights`` is a safetensors or torch file, ``hub`` (downloaded by timm), or ``none`` (random, always the same).
    ``shape`` overrides timm's own numbers (``embed_dim``, ``depth``, ...). Position and patch embeddings of the file
    are resampled where sizes differ. Raises WeightsError.
    """
    pretrained = weights != "none"
    overlay = {}
    if weights not in ("hub", "none"):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise WeightsError(f"weights file {path} is missing; set model.weights to a local file, hub or none")
        overlay = {"file": str(path), "custom_load": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(0, "backbone"))
        try:
            model = timm.create_model(
                name, pretrained, pretrained_cfg_overlay=overlay, num_classes=classes, img_size=image, patch_size=patch, **shape
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]
            if weights == "hub" and timm.is_model(name):
                raise WeightsError(
                    f"the weights of {name} could not be downloaded ({reason}); without a network, "
                    "set model.weights to a local safetensors or torch file, or to none"
                ) from None
            raise WeightsError(f"model {name} could not be built with weights={weights} ({reason})") from None
    if not isinstance(model, VisionTransformer):
        raise WeightsError(f"model {name} is no plain vision transformer; choose one of timm's vit_* models")
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    model.asked = {"img_size": image, "patch_size": patch, **shape}  # of timm, so that an export can ask for the same again
    return model
