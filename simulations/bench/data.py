"""The way of a picture into the model, on one core: crop and flip (and resize), beside torch's DataLoader with PIL.

Ours also encrypts; the first DataLoader does not, which is to its advantage, the second does the same work, block by block.
"""

from __future__ import annotations

from typing import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fl.ciphers.pixel_shuffle import pixel_shuffle
from fl.datasets.images import augment, resize
from fl.lean.heap import keep_freed_memory
from fl.lean.table import gathering
from fl.learn import normalise
from fl.randomness import generator
from simulations.bench.cipher import KEY
from simulations.bench.flower_vit.task import transform
from simulations.bench.machine import machine
from simulations.bench.pairs import faster, race, rate
from simulations.bench.report import Check, Options, Row, Section

CASES = ((32, 4, 2048, 30), (224, 16, 256, 10))  # side, block, pictures, and the target
BATCH = 64


def run(options: Options) -> Iterator[Section]:
    """One table for 32 x 32, one for pictures scaled to 224 x 224."""
    less = 4 if options.quick else 1
    return (compare(side, block, count // less, target, options.pairs) for side, block, count, target in CASES)


def ours(side: int, block: int) -> Callable[[Tensor], Tensor]:
    """One batch, uint8 (n, 3, 32, 32) -> float32 (n, 3, side, side), as a client prepares it while it trains."""
    keep_freed_memory()  # as a client does; the peer has the good of it, too
    stream, cipher = generator(0, "bench", "augment"), pixel_shuffle(KEY, block)
    if side == 32:
        gathered = gathering(cipher, side)
        return lambda images: normalise(gathered(images, stream))
    return lambda images: normalise(cipher.encrypt(resize(augment(images, stream), side)))


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
    """Pictures a second through both."""
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    peer, equal, own = "DataLoader, PIL", "DataLoader, PIL, with encryption", "ours, with encryption"
    loaders = {name: DataLoader(Pictures(images, side, b), BATCH, shuffle=True) for name, b in ((peer, 0), (equal, block))}
    prepare = ours(side, block)

    def batches() -> None:
        for chosen in torch.randperm(count).split(BATCH):
            prepare(images.index_select(0, chosen))  # as Examples.at does

    peers = {name: lambda loader=loader: sum(1 for _ in loader) for name, loader in loaders.items()}
    seconds = race({**peers, own: batches}, pairs)
    ceiling = machine().copy / (4 * 3 * side * side)
    limit = f"{ceiling:,.0f} img/s written once"
    checks = tuple(Check(faster(seconds, own, p).median, ">=", target, f"x {p}", ceiling / rate(seconds, p, count)) for p in peers)
    rows = [
        Row(peer, rate(seconds, peer, count), "img/s", faster(seconds, peer, peer), limit),
        Row(equal, rate(seconds, equal, count), "img/s", faster(seconds, equal, peer), limit),
        Row(own, rate(seconds, own, count), "img/s", faster(seconds, own, peer), limit, checks),
    ]
    return Section("data", f"32 x 32 pictures to {side} x {side} float32, batch {BATCH}, one core", peer, rows)
