"""Crop, flip and cipher as one gather: each is a move of pixels, so their composition is a table of places.

    out[j] = padded[dy * wide + dx + table[flip][j]]        j = 0 ... 3 h w - 1

Where each value of the augmented, encrypted picture comes from in the padded one. A shift adds the same to every place, so
two rows are enough, straight and mirrored, made once by sending the *places* of a picture through the very functions that
pictures go through. A shift is where a picture's run of bytes begins, a copy; then the straight and the mirrored ones of a
batch are a gather each, and the cipher costs nothing.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from fl.ciphers import Cipher
from fl.datasets.images import draw
from fl.learn import Prepare


def gathering(cipher: Cipher, side: int) -> Prepare:
    """A function that does to uint8 (n, 3, side, side) what `augment` and then ``cipher.encrypt`` do, from the same draws.

    The cipher only moves values (``cipher.moves``). The table takes 48 side^2 bytes: 48 kB at 32 pixels.
    """
    reach = side // 8
    wide = side + 2 * reach
    corner = torch.arange(3 * wide * wide).view(1, 3, wide, wide)[..., :side, :side]
    table = cipher.encrypt(torch.cat([corner, corner.flip(-1)])).flatten(1)
    length = int(table.max()) + 1

    def prepare(images: Tensor, stream: Generator) -> Tensor:
        dy, dx, flip = draw(len(images), side, stream)
        padded = pad(images, (reach, reach, reach, reach)).flatten()
        starts = torch.arange(len(images)) * (padded.numel() // len(images)) + dy * wide + dx
        windows = padded.as_strided((padded.numel() - length + 1, length), (1, 1))  # one from every byte on, without a copy
        order = torch.argsort(flip.byte(), stable=True)  # the straight ones first
        shifted = windows.index_select(0, starts[order])  # runs of bytes, so that one row of places serves all pictures
        straight = len(images) - int(flip.sum())
        moved = [part.gather(1, places.expand(len(part), -1)) for part, places in zip(shifted.tensor_split([straight]), table)]
        return torch.cat(moved).index_select(0, torch.argsort(order)).view_as(images)

    return prepare
