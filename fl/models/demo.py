"""The demo's backbone: a small ViT, pretrained on plain pictures of other kinds than the demo's, made once and kept.

It stands where ImageNet weights stand in earnest: public, trained on plain images, ignorant of the ten classes.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import PositiveInt
from torch import nn

from fl.adapter import save
from fl.datasets import Examples
from fl.datasets.demo import PUBLIC, draw
from fl.datasets.images import resize
from fl.learn import fit
from fl.models import WeightsError
from fl.models.vit import vit
from fl.randomness import derive, generator
from fl.recipe import Recipe

NAME = "vit_tiny_patch16_224"
SHAPE = {"embed_dim": 64, "depth": 3, "num_heads": 4}
PICTURES = 4000
# Epochs until the last digits of a machine's arithmetic decide no longer how good the backbone becomes.
RECIPE = Recipe(optimizer="adamw", lr={"backbone": 3e-3, "patch_embed": 3e-3, "head": 3e-3}, epochs=16, batch=64, weight_decay=0.05)


def demo_vit(image: PositiveInt, patch: PositiveInt, classes: PositiveInt, weights: str) -> nn.Module:
    """ViT of width 64 and 3 blocks (0.2 M parameters) with the weights in the folder ``weights``, made if missing; or ``none``, as `vit`."""
    if weights == "none":
        return vit(NAME, image, patch, classes, weights, **SHAPE)
    if weights == "hub" or Path(weights).expanduser().is_file():
        raise WeightsError(f"model=demo_vit keeps its weights in a folder, so model.weights must be one, or none, got {weights}")
    made_by = derive(0, image, patch, PICTURES, repr(SHAPE), repr(RECIPE)) % 10**6  # other numbers, another file
    path = Path(weights).expanduser() / f"demo_vit_{image}_{patch}_{made_by}.safetensors"
    if not path.exists():
        pretrain(path, image, patch)
    return vit(NAME, image, patch, classes, str(path), **SHAPE)


def pretrain(path: Path, image: int, patch: int) -> None:
    """Train on ``PICTURES`` plain pictures of the public kinds and write the weights to ``path``, whole or not at all."""
    model = vit(NAME, image, patch, len(PUBLIC), "none", **SHAPE)
    images, labels = draw(PUBLIC, PICTURES, generator(0, "demo", "public"))
    fit(model, Examples(resize(images, image), labels), RECIPE, generator(0, "demo", "pretrain"))
    save(model.state_dict(), path)
