"""Model, data and training of the peer, in the layout of Flower's own examples.

It is measured in parts (`get_model`, `transform`, `shuffle_blocks`) and whole (client_app.py, server_app.py).
"""

from __future__ import annotations

from types import ModuleType

import timm
import torch
from numpy import empty_like, ndarray
from numpy.random import RandomState
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10
from torchvision.transforms import Compose, Lambda, Normalize, PILToTensor, RandomCrop, RandomHorizontalFlip, Resize, ToTensor

SMALL = {"name": "vit_tiny_patch16_224", "image": 32, "patch": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}
dataset = None  # one copy in a process, as the examples keep it


def get_model(name: str, image: int, patch: int, **shape: int) -> nn.Module:
    """timm's ViT with peft's LoRA (rank 4) on the fused qkv; head and patch embedding train whole. Ten classes."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10, img_size=image, patch_size=patch, **shape)
    lora = peft().LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head", "patch_embed.proj"])
    return peft().get_peft_model(model, lora)


def peft() -> ModuleType:
    """The library, which nothing but the bench and the tests needs. Ends the program in one line where it is missing."""
    try:
        import peft
    except ImportError:
        raise SystemExit('error: the bench compares with peft, which is missing; install it: pip install ".[test]"') from None
    return peft


def shuffle_blocks(image: ndarray, order: ndarray, block: int) -> ndarray:
    """The cipher, block by block: uint8 (3, h, w) -> the same; value ``order[j]`` of each block goes to place j."""
    shuffled = empty_like(image)
    for top in range(0, image.shape[1], block):
        for left in range(0, image.shape[2], block):
            values = image[:, top : top + block, left : left + block].reshape(-1)
            shuffled[:, top : top + block, left : left + block] = values[order].reshape(3, block, block)
    return shuffled


def transform(side: int = 32, block: int = 0) -> Compose:
    """PIL picture of 32 x 32 -> float32 (3, side, side): crop, flip, resize; with a ``block``, shuffled by a fixed key."""
    steps = [RandomCrop(32, padding=4), RandomHorizontalFlip()] + ([Resize(side)] if side != 32 else [])
    if block:
        order = RandomState(0).permutation(3 * block * block)
        steps += [PILToTensor(), Lambda(lambda x: torch.from_numpy(shuffle_blocks(x.numpy(), order, block)).float() / 255)]
    else:
        steps += [ToTensor()]
    return Compose([*steps, Normalize([0.5] * 3, [0.5] * 3)])


def load_data(root: str, partition: int, images: int, batch: int) -> DataLoader:
    """Client ``partition``'s share of CIFAR-10: ``images`` encrypted training images."""
    global dataset
    if dataset is None:
        dataset = CIFAR10(root, transform=transform(32, SMALL["patch"]))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    return DataLoader(Subset(dataset, order[partition * images : (partition + 1) * images]), batch, shuffle=True)


def train(model: nn.Module, loader: DataLoader, rate: float) -> float:
    """One epoch of AdamW in float32. Returns the mean loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    total = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)
