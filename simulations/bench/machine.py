"""The roofline: what one core of this machine does at best, and how many useful operations a training step has.

A block of width d on N tokens takes 24 d^2 N operations for its linear layers and 4 N^2 d for attention, forward. Full
fine-tuning pays three times both (forward, to the input, to the weights). With a frozen base the linear layers pay twice;
attention has no weights and still pays three times; the patch embedding, first of all layers, has no input to go back to.
LoRA's own operations are under one percent.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from simulations.bench.pairs import race


class Machine(NamedTuple):
    """One core at its best: matrix products in FLOP/s; copying and reading in bytes/s, each byte counted once."""

    float32: float
    bfloat16: float
    copy: float
    read: float

    def __str__(self) -> str:
        float32, bfloat16, copy, read = (f"{value / 1e9:.3g}" for value in self)
        return f"{float32} GFLOP/s float32, {bfloat16} bfloat16; copy {copy} GB/s, read {read} GB/s"


@lru_cache(maxsize=1)
def machine(repeats: int = 25) -> Machine:
    """Measure this machine once: products of 1024^3, a copy and a sum of 256 MB; the best of ``repeats``.

    On a machine that is shared the best moment of these may still lie below the best moment of a step.
    """
    side, count = 1024, 64 * 2**20
    a, b = torch.rand(side, side), torch.rand(side, side)
    a16, b16 = a.bfloat16(), b.bfloat16()
    source, target = torch.ones(count), torch.zeros(count)
    work = {
        "float32": lambda: a @ b,
        "bfloat16": lambda: a16 @ b16,
        "copy": lambda: target.copy_(source),
        "read": lambda: source.sum(),
    }
    best = {name: min(seconds) for name, seconds in race(work, repeats, least=0.0).items()}
    product, size = 2 * side**3, 4 * count
    return Machine(product / best["float32"], product / best["bfloat16"], size / best["copy"], size / best["read"])


class Flops(NamedTuple):
    """Useful operations for one image: a forward pass, and a training step of three kinds."""

    forward: float
    full: float
    frozen: float
    pooled: float  # frozen, and the last block asked for the class token alone, of which the head reads


def flops(width: int, depth: int, image: int, patch: int) -> Flops:
    """Operations of a ViT with a class token on ``image`` x ``image`` pictures, MLP ratio 4; the head is left out."""
    patches = (image // patch) ** 2
    tokens = patches + 1
    linears, attention = 24 * width**2 * tokens, 4 * tokens**2 * width
    embedding = 2 * patches * (3 * patch**2) * width
    forward = depth * (linears + attention) + embedding
    full = 3 * depth * (linears + attention) + 2 * embedding
    frozen = depth * (2 * linears + 3 * attention) + 2 * embedding
    spared = 2 * 20 * width**2 * (tokens - 1) + 3 * 4 * tokens * (tokens - 1) * width  # all but keys and values
    return Flops(forward, full, frozen, frozen - spared)
