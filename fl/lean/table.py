"""Crop, flip and cipher as one gather: each is a move of pixels, so their composition is a table of places.

    out[j] = padded[dy * wide + dx + table[flip][j]]        j = 0 ... 3 h w - 1

Where each value of the augmented, encrypted picture comes from in the padded one. A shift adds the same to every place, so
two rows are enough, straight and mirrored, made once by sending the *places* of a picture through the very functions that
pictures go through. A batch then costs one gather, and the cipher nothing.
"""

from __future__ import annotations

import numpy as np
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
    table = cipher.encrypt(torch.cat([corner, corner.flip(-1)])).flatten(1).numpy()

    def prepare(images: Tensor, stream: Generator) -> Tensor:
        dy, dx, flip = draw(len(images), side, stream)
        padded = pad(images, (reach, reach, reach, reach)).flatten(1).numpy()
        found = np.empty((len(images), table.shape[1]), np.uint8)
        for row, source, shift, mirrored in zip(found, padded, (dy * wide + dx).tolist(), flip.long().tolist()):
            np.take(source[shift:], table[mirrored], out=row, mode="clip")  # "clip" spares it the check of every place
        return torch.from_numpy(found).view_as(images)

    return prepare
