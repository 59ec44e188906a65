"""Pixel shuffling inside each block (Lin, Imaizumi & Kiya, arXiv 2507.11943, section on block-wise encryption).

One keyed permutation pi of the 3*p*p values of a block, across channels, the same for every block and every image:
``y[j] = x[pi(j)]`` with the block's values counted channel by channel, row by row, as a Conv2d weight counts them.
For p = 2:

    channel 0      channel 1      channel 2            block as a vector
     0  1           4  5           8  9          ->    0 1 2 3 | 4 5 6 7 | 8 9 10 11
     2  3           6  7          10 11

It hides little: block means stay visible, one known pair of images gives pi, and a few encrypted images do too.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import pixel_shuffle as to_image
from torch.nn.functional import pixel_unshuffle as to_blocks

from fl.ciphers import Cipher
from fl.keys import SharedKey


def pixel_shuffle(key: SharedKey, block: PositiveInt) -> Cipher:
    """The paper's cipher for blocks of ``block`` x ``block`` pixels.

    ``encrypt`` and ``decrypt`` take (n, 3, h, w), uint8 or int64; they raise ValueError unless h and w are multiples of
    ``block``. ``to_blocks`` lays x out as (n, 3*p*p, h/p, w/p), its second axis in the order drawn above.
    """
    order = key.permutation("image pixel_shuffle", 3 * block * block)
    back = order.argsort()

    @lru_cache(maxsize=4)
    def table(h: int, w: int, inverse: bool) -> Tensor:
        """Where each value of an image comes from: the block's permutation written out for h x w, int64 (3 h w,)."""
        places = torch.arange(3 * h * w, dtype=torch.float64).view(1, 3, h, w)  # exact below 2^53; the layouts want a float
        return to_image(to_blocks(places, block)[:, back if inverse else order], block).long().flatten()

    def moved(x: Tensor, inverse: bool) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % block or x.shape[3] % block:
            raise ValueError(f"images must be (n, 3, h, w) with h and w multiples of {block}, got {tuple(x.shape)}")
        places = table(x.shape[2], x.shape[3], inverse).to(x.device).expand(len(x), -1)
        return x.flatten(1).gather(1, places).view_as(x)  # ten times as fast as moving whole layouts about

    return Cipher(
        encrypt=lambda x: moved(x, inverse=False),
        decrypt=lambda x: moved(x, inverse=True),
        absorb=lambda weight: weight.flatten(1)[:, order].view_as(weight),
        release=lambda weight: weight.flatten(1)[:, back].view_as(weight),
        moves=True,
    )
