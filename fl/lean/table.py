"""Crop, flip and whatever else moves pixels as one gather: the composition of moves is a table of places.

    out[j] = spread[flip, dy * wide + dx' + table[j]]        j = 0 ... 3 h w - 1;   dx' = dx, or 2 reach - dx if mirrored

Where each value of the augmented, encrypted, laid out picture comes from in the framed one. A shift adds the same to every
place, so one row is enough, made once by sending the *places* of a picture through the very functions that pictures go
through. A shift, like a choice between a picture and its mirror image, is where a run of bytes begins: a copy. Then one
gather moves a batch, and the cipher and the layout cost nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Callable

import torch
from torch import Generator, Tensor

from fl.datasets.images import draw, framed


def spread(images: Tensor) -> Tensor:
    """uint8 (n, 3, h, w) -> (n, 2, 3, h + 2 reach, w + 2 reach): each picture and its mirror image, framed as `augment` has it."""
    return framed(torch.stack([images, images.flip(-1)], dim=1))


def gathering(move: Callable[[Tensor], Tensor], height: int, width: int) -> Callable[[Tensor, Tensor, Generator], Tensor]:
    """A `Prepare.batch` that does to the chosen ones of uint8 (n, 3, height, width) what `augment` and then ``move`` do.

    It also takes them as `spread` leaves them, which is faster where they stay so; on any device, from draws made on the CPU.
    ``move`` takes int64 and only moves values, as a cipher that ``moves`` does. The table takes 24 height * width bytes.
    """
    reach = height // 8
    tall, wide = height + 2 * reach, width + 2 * reach
    plane = 3 * tall * wide
    moved = move(torch.arange(plane).view(1, 3, tall, wide)[..., :height, :width])
    length = int(moved.max()) + 1
    table = lru_cache(moved.flatten(1).to)  # by device

    def batch(images: Tensor, chosen: Tensor, stream: Generator) -> Tensor:
        dy, dx, flip = draw(len(chosen), height, stream)
        if images.ndim == 4:
            images, chosen = spread(images.index_select(0, chosen.to(images.device))), torch.arange(len(chosen))
        starts = torch.where(flip, plane + 2 * reach - dx, dx).add_(dy, alpha=wide).add_(chosen, alpha=2 * plane)
        runs = images.view(-1).as_strided((images.numel() - length + 1, length), (1, 1))  # one from every byte on, without a copy
        shifted = runs.index_select(0, starts.to(images.device))
        return shifted.gather(1, table(images.device).expand(len(shifted), -1)).view(-1, *moved.shape[1:])

    return batch
