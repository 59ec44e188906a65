"""The cipher on one core: ours beside a loop over blocks, NumPy's advanced indexing, and a copy of as many bytes."""

from __future__ import annotations

import statistics
from typing import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fl.ciphers.pixel_shuffle import pixel_shuffle
from fl.keys import SharedKey
from fl.lean.heap import keep_freed_memory
from simulations.bench.flower_vit.task import shuffle_blocks
from simulations.bench.pairs import Work, faster, race, rate
from simulations.bench.report import Check, Options, Row, Section

KEY = SharedKey(bytes(32))  # a key of this bench alone
CASES = ((2048, 32, 4, 192), (256, 224, 16, 768))  # pictures, side, block, and the model's width


def run(options: Options) -> Iterator[Section]:
    """One table for small pictures, one for large ones."""
    keep_freed_memory()  # as a client does; else what is timed is the system's clearing of pages
    return (compare(count // (4 if options.quick else 1), *rest, options.pairs) for count, *rest in CASES)


def ours(block: int) -> Callable[[Tensor], Tensor]:
    """Our cipher on uint8 (n, 3, h, w)."""
    return pixel_shuffle(KEY, block).encrypt


def per_block(x: Tensor, block: int) -> Tensor:
    """The loop over pictures and blocks, as it is usually published."""
    order = KEY.permutation("image pixel_shuffle", 3 * block * block).numpy()
    return torch.from_numpy(np.stack([shuffle_blocks(image, order, block) for image in x.numpy()]))


def indexed(x: Tensor, block: int) -> Tensor:
    """NumPy's advanced indexing on all blocks at once: (n, blocks, 3 p p)[:, :, order]."""
    order = KEY.permutation("image pixel_shuffle", 3 * block * block).numpy()
    n, c, h, w = x.shape
    grid = x.numpy().reshape(n, c, h // block, block, w // block, block).transpose(0, 2, 4, 1, 3, 5)
    mixed = grid.reshape(n, -1, 3 * block * block)[:, :, order].reshape(grid.shape)
    return torch.from_numpy(np.ascontiguousarray(mixed.transpose(0, 3, 1, 4, 2, 5)).reshape(n, c, h, w))


def compare(count: int, side: int, block: int, width: int, pairs: int) -> Section:
    """Gigabytes a second of ``count`` uint8 pictures of ``side``; the last row folds the cipher into the model once."""
    x = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    encrypt, target = ours(block), torch.empty_like(x)
    weight, absorb = torch.rand(width, 3, block, block), pixel_shuffle(KEY, block).absorb
    order = KEY.permutation("image pixel_shuffle", 3 * block * block)
    rows_of = torch.randint(0, 256, (len(order), x.numel() // len(order)), dtype=torch.uint8)
    moved = torch.empty_like(rows_of)
    loop, indexing, copy = "loop over blocks", "NumPy advanced indexing", "copy"
    own, folded = "ours", "ours, folded into the model"
    bulk = "torch's row gather: a value of all blocks is a row"
    work: dict[str, Work] = {
        loop: lambda: per_block(x, block),
        indexing: lambda: indexed(x, block),
        copy: lambda: target.copy_(x),
        own: lambda: encrypt(x),
        bulk: lambda: torch.index_select(rows_of, 0, order, out=moved),  # where it was before, as the copy
        folded: lambda: absorb(weight),
    }
    seconds = race(work, pairs)
    limit = f"{rate(seconds, copy, x.nbytes / 1e9):.2g} GB/s, a copy"
    checks = tuple(
        Check(faster(seconds, own, peer).median, ">=", target, f"x {peer}", faster(seconds, copy, peer).median)
        for peer, target in ((loop, 40), (indexing, 4))
    )
    targets = {own: checks, bulk: (Check(faster(seconds, bulk, copy).median, ">=", 0.5, "x copy", 1.0),)}
    rows = [
        Row(name, rate(seconds, name, x.nbytes / 1e9), "GB/s", faster(seconds, name, loop), limit, targets.get(name, ()))
        for name in (loop, indexing, copy, own, bulk)
    ]
    rows.append(Row(folded, 1e6 * statistics.median(seconds[folded]), "us once, none an image", None, "0 an image"))
    return Section("cipher", f"{count} pictures of {side} x {side}, blocks of {block}, uint8, one core", loop, rows)
