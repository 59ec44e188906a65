"""Ciphers: invertible maps of uint8 images, one file each.

A cipher file holds one builder ``(key: SharedKey, block: int, ...) -> Cipher``; ``conf/cipher/<name>.yaml`` names it.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

from torch import Tensor


class Cipher(NamedTuple):
    """``decrypt(encrypt(x)) == x`` bit for bit, for uint8 images (n, 3, h, w) whose sides are multiples of the block.

    ``absorb`` carries a patch embedding from plain to cipher order and ``release`` carries it back, exactly:
    with float weights W (d, 3, block, block) and any image x,

        conv(encrypt(x), absorb(W), stride=block) == conv(x, W, stride=block)      release(absorb(W)) == W

    up to the order of summation, provided that every channel is normalised alike (Nagamori & Kiya, arXiv 2309.02556,
    "domain adaptation"). A cipher that no patch embedding can absorb leaves both None, and has no keyed start.

    ``moves`` says that ``encrypt`` only moves values, whatever they are, in every block alike: then it also takes int64, and
    what it does to the places of an image may be composed with a crop and a flip (`fl.lean.table`, `fl.lean.rows`).
    """

    encrypt: Callable[[Tensor], Tensor]
    decrypt: Callable[[Tensor], Tensor]
    absorb: Callable[[Tensor], Tensor] | None
    release: Callable[[Tensor], Tensor] | None
    moves: bool = False
