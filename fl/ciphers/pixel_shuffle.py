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

from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import pixel_shuffle as to_image
from torch.nn.functional import pixel_unshuffle as to_blocks

from fl.ciphers import Cipher
from fl.keys import SharedKey


def pixel_shuffle(key: SharedKey, block: PositiveInt) -> Cipher:
    """The paper's cipher for blocks of ``block`` x ``block`` pixels.

    ``encrypt`` and ``decrypt`` take uint8 (n, 3, h, w); they raise ValueError unless h and w are multiples of ``block``.
    ``to_blocks`` lays x out as (n, 3*p*p, h/p, w/p), its second axis in the order drawn above.
    """
    order = key.permutation("image pixel_shuffle", 3 * block * block)
    back = order.argsort()

    def encrypt(x: Tensor) -> Tensor:
        return to_image(to_blocks(fitting(x), block)[:, order], block)

    def decrypt(x: Tensor) -> Tensor:
        return to_image(to_blocks(fitting(x), block)[:, back], block)

    def absorb(weight: Tensor) -> Tensor:
        return weight.flatten(1)[:, order].view_as(weight)

    def release(weight: Tensor) -> Tensor:
        return weight.flatten(1)[:, back].view_as(weight)

    def fitting(x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % block or x.shape[3] % block:
            raise ValueError(f"images must be (n, 3, h, w) with h and w multiples of {block}, got {tuple(x.shape)}")
        return x

    return Cipher(encrypt, decrypt, absorb, release)
