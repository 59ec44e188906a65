"""The way of a picture into the model, on one core: crop and flip (and resize), beside torch's DataLoader with PIL.

Ours also encrypts; the first DataLoader does not, which is to its advantage, the second does the same work, block by block.
Each path ends where a model's first product begins: theirs at float32 pictures, which a convolution lays out in blocks by
itself; ours at blocks in [-1, 1], in either precision of the lean step.
"""

from __future__ import annotations

from typing import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fl.ciphers.pixel_shuffle import pixel_shuffle
from fl.lean.blocks import levels
from fl.lean.heap import keep_freed_memory
from fl.lean.rows import augmenting
from fl.lean.table import spread
from fl.randomness import generator
from simulations.bench.cipher import KEY
from simulations.bench.flower_vit.task import transform
from simulations.bench.machine import machine
from simulations.bench.pairs import Work, faster, race, rate
from simulations.bench.report import Check, Options, Row, Section

CASES = ((32, 4, 2048, 30), (224, 16, 256, 10))  # side, block, pictures, and the target
BATCH = 64


def run(options: Options) -> Iterator[Section]:
    """One table for 32 x 32, one for pictures scaled to 224 x 224."""
    less = 4 if options.quick else 1
    return (compare(side, block, count // less, target, options.pairs) for side, block, count, target in CASES)


def ours(images: Tensor, side: int, block: int, precision: str) -> Callable[[Tensor], Tensor]:
    """The chosen ones of uint8 (n, 3, 32, 32) as the first product of a client's lean step reads them, side x side."""
    keep_freed_memory()  # as a client does; the peer has the good of it, too
    stream, prepare = generator(0, "bench", "augment"), augmenting(pixel_shuffle(KEY, block), 32, 32, side, block)
    resident, dtype = spread(images), getattr(torch, precision)
    return lambda chosen: levels(prepare.batch(resident, chosen, stream), block, dtype)


class Pictures(torch.utils.data.Dataset):
    """PIL pictures in memory with the peer's transform, as torchvision's CIFAR10 serves them."""

    def __init__(self, images: Tensor, side: int, block: int = 0) -> None:
        from PIL import Image

        self.pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
        self.transform = transform(side, block)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), 0


def compare(side: int, block: int, count: int, target: float, pairs: int) -> Section:
    """Pictures a second through all of them, each as its own model's first product reads them."""
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    peer, equal = "DataLoader, PIL", "DataLoader, PIL, with encryption"
    own = {f"ours, with encryption, {precision}": precision for precision in ("float32", "bfloat16")}
    loaders = {name: DataLoader(Pictures(images, side, b), BATCH, shuffle=True) for name, b in ((peer, 0), (equal, block))}

    def through(precision: str) -> Work:
        prepare = ours(images, side, block, precision)
        return lambda: sum(len(prepare(chosen)) for chosen in torch.randperm(count).split(BATCH))

    peers = {name: lambda loader=loader: sum(1 for _ in loader) for name, loader in loaders.items()}
    seconds = race({**peers, **{name: through(precision) for name, precision in own.items()}}, pairs)

    def row(name: str) -> Row:
        ceiling = machine().copy / (getattr(torch, own.get(name, "float32")).itemsize * 3 * side * side)
        checks = (Check(faster(seconds, name, p).median, ">=", target, f"x {p}", ceiling / rate(seconds, p, count)) for p in peers)
        figures = rate(seconds, name, count), "img/s", faster(seconds, name, peer), f"{ceiling:,.0f} img/s written once"
        return Row(name, *figures, tuple(checks) if name in own else ())

    return Section("data", f"32 x 32 pictures to {side} x {side}, batch {BATCH}, one core", peer, [row(name) for name in seconds])
