"""Small colour pictures drawn by our own seeded code, so that a first run needs no network and no file.

A kind is a shape with a texture. Ten kinds are the demo's classes; the others are `PUBLIC`, on which the demo's backbone
is pretrained, as ImageNet stands to CIFAR. Both hold every shape and every texture. Colours, places, sizes, angles and
noise vary in every picture, so that neither colour nor place tells the class.
"""

from __future__ import annotations

from math import pi

import torch
from pydantic import PositiveInt
from torch import Generator, Tensor

from fl.datasets import Dataset, Examples
from fl.randomness import generator

SHAPES = ("disc", "triangle", "ring", "cross")
TEXTURES = ("plain", "striped", "barred", "slanted", "checked")
KINDS = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
CLASSES, PUBLIC = KINDS[1::2], KINDS[::2]
SIDE = 32


def demo(image: int, train: PositiveInt = 2000, test: PositiveInt = 1000, seed: int = 0) -> Dataset:
    """``train`` and ``test`` pictures of 32 x 32, the ten ``CLASSES`` in turn."""
    return Dataset(
        draw(CLASSES, train, generator(seed, "demo", "train")),
        draw(CLASSES, test, generator(seed, "demo", "test")),
        CLASSES,
        {},
    )


def draw(kinds: tuple[str, ...], n: int, stream: Generator) -> Examples:
    """n pictures uint8 (n, 3, 32, 32), light ink on dark paper, labels counting through ``kinds``."""
    labels = torch.arange(n) % len(kinds)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=stream)

    axis = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    turn, size = uniform(-0.3, 0.3, 1, 1), uniform(0.8, 1, 1, 1)
    x0, y0 = x - uniform(-0.15, 0.15, 1, 1), y - uniform(-0.15, 0.15, 1, 1)
    u = (turn.cos() * x0 + turn.sin() * y0) / size    # (n, 32, 32): the picture in the shape's own axes
    v = (turn.cos() * y0 - turn.sin() * x0) / size
    phase = uniform(0, 1, 1, 1)
    inside = torch.empty(n, SIDE, SIDE)
    for label, kind in enumerate(kinds):
        texture, shape = kind.split()
        mine = slice(label, None, len(kinds))
        inside[mine] = _shape(shape, u[mine], v[mine]) * _texture(texture, u[mine], v[mine], phase[mine])
    ink, paper = uniform(0.5, 1, 3, 1, 1), uniform(0, 0.4, 3, 1, 1)
    noise = 0.05 * torch.randn(n, 3, SIDE, SIDE, generator=stream)
    picture = paper + (ink - paper) * inside[:, None] + noise
    return Examples((picture.clamp(0, 1) * 255).round().to(torch.uint8), labels)


def _shape(name: str, u: Tensor, v: Tensor) -> Tensor:
    """A soft mask in [0, 1] of one of ``SHAPES``, which fills about the unit disc."""
    radius = (u.square() + v.square()).sqrt()
    match name:
        case "disc":
            beyond = radius - 0.9
        case "triangle":
            beyond = torch.maximum(v - 0.65, 0.87 * u.abs() - 0.5 * v - 0.5)
        case "ring":
            beyond = (radius - 0.72).abs() - 0.21
        case "cross":
            beyond = torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.3, torch.maximum(u.abs(), v.abs()) - 0.9)
    return torch.sigmoid(-16 * beyond)


def _texture(name: str, u: Tensor, v: Tensor, phase: Tensor) -> Tensor:
    """A soft mask in [0, 1] of one of ``TEXTURES``; a period is about six pixels."""
    across, down, askew = (torch.sin(2 * pi * (2.5 * axis + phase)) for axis in (u, v, (u + v) / 2**0.5))
    match name:
        case "plain":
            wave = torch.ones_like(u)
        case "striped":
            wave = down
        case "barred":
            wave = across
        case "slanted":
            wave = askew
        case "checked":
            wave = across * down
    return torch.sigmoid(8 * wave)
