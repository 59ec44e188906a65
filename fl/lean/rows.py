"""Crop, flip, resize and cipher: the resize in its two passes, and between and after them whole runs of bytes are moved.

    columns   (n, h, w, 3)  ->  (n, h, side, 3)           each row of a picture by itself
    lay out                 ->  (h, 3 p n side / p)       still small: the columns of all pictures, in an order of our choice
    rows      (h, ...)      ->  (side, 3 p n side / p)    each column by itself, so that their order is all the same
    cipher                  ->  (3 p p, side / p, n side / p)

In that order a value of a block, in all the blocks beside each other and in all pictures, is one run of n side / p bytes,
and the cipher moves runs; a picture's values one by one would cost a load each. Rounding after each pass is torch's own, so
that the result is `augment`, `resize` and ``cipher.encrypt`` bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Callable

import torch
from torch import Generator, Tensor

from fl.ciphers import Cipher
from fl.course import Prepare
from fl.datasets.images import scaled
from fl.lean.blocks import blocks
from fl.lean.table import gathering


@lru_cache(maxsize=4)
def augmenting(cipher: Cipher, height: int, width: int, side: int, p: int) -> Prepare:
    """From chosen ones of uint8 (n, 3, height, width) to blocks: augmented, resized where they do not fit, encrypted."""
    if (height, width) == (side, side):
        return Prepare(gathering(lambda x: blocks(cipher.encrypt(x), p), side, side))
    return Prepare(resizing(cipher, height, width, side, p), anywhere=False)


def resizing(cipher: Cipher, height: int, width: int, side: int, p: int) -> Callable[[Tensor, Tensor, Generator], Tensor]:
    """A `Prepare.batch` that does to the chosen ones of uint8 (n, 3, height, width) what `augment`, `resize` and the cipher do.

    It also takes them as `fl.lean.table.spread` leaves them. Returns blocks (n, side / p, side / p, 3, p, p), on the CPU. The
    cipher moves values within blocks, in every block alike (``cipher.moves``).
    """
    crop = gathering(lambda x: x.permute(0, 2, 3, 1), height, width)
    order = cipher.encrypt(torch.arange(3 * p * p).view(1, 3, p, p)).flatten()
    channel, y, x = order // p**2, order // p % p, order % p
    top = torch.arange(0, side, p)
    runs = (((y[:, None] + top) * 3 + channel[:, None]) * p + x[:, None]).flatten()

    def batch(images: Tensor, chosen: Tensor, stream: Generator) -> Tensor:
        small = crop(images, chosen, stream).permute(0, 3, 1, 2)
        columns = scaled(small, height, side).unflatten(3, (-1, p)).permute(2, 1, 4, 0, 3).contiguous()
        strips = columns.view(1, height, -1, 3).permute(0, 3, 1, 2)  # any three neighbours will do as channels
        tall = scaled(strips, side, strips.shape[3]).permute(0, 2, 3, 1)
        moved = tall.reshape(side * 3 * p, -1).index_select(0, runs)
        return moved.view(3, p, p, side // p, len(chosen), side // p).permute(4, 3, 5, 0, 1, 2)

    return batch
