"""Pictures as the blocks that the patch embedding multiplies.

    (n, 3, h, w) -> (n, h / p, w / p, 3, p, p)      a block's values counted as a Conv2d weight counts them

That is a move of bytes, which `fl.lean.table` and `fl.lean.rows` do on their way. Their results lie in memory as it came
cheapest, and the product takes the blocks in that order: which of its rows comes first is all the same to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fl.lean.stacked import affine
from fl.learn import normalise

PIECE = 2**18  # values, which stay in a core's cache from one operation to the next


def blocks(images: Tensor, p: int) -> Tensor:
    """(n, 3, h, w) as a view (n, h / p, w / p, 3, p, p), of any dtype; what has six axes is in blocks already."""
    return images if images.ndim == 6 else images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)


def levels(images: Tensor, p: int, dtype: torch.dtype) -> Tensor:
    """uint8 (n, 3, h, w) or blocks of p x p -> what the first product reads: (n, h / p, w / p, 3 p p) in [-1, 1].

    Laid out while they are still bytes. The result lies in memory as the blocks do.
    """
    x = blocks(images, p).flatten(3)
    if x.device.type != "cpu" or x.numel() <= PIECE:
        return normalise(x).to(dtype)
    made = torch.empty_like(x, dtype=dtype)
    x = x if x.stride() == made.stride() else torch.empty_like(made, dtype=x.dtype).copy_(x)
    for given, some in zip(*(t.as_strided((t.numel(),), (1,)).split(PIECE) for t in (x, made))):
        some.copy_(normalise(given, out=some if dtype == torch.float32 else None))
    return made


def embedded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``affine`` of (n, h, w, k), whose first three axes are multiplied in the order in which they lie: (n, h w, d).

    With a weight (C, d, k) in the order of their images, since each C-th of these has a weight of its own.
    """
    if weight.dim() == 3 or torch.compiler.is_compiling():  # a compiler knows no strides before the batch is there
        return affine(x.flatten(1, 2), weight, bias)
    order = sorted(range(3), key=x.stride, reverse=True)
    rows = affine(x.permute(*order, 3).flatten(0, 2), weight, bias)
    return rows.unflatten(0, [x.shape[axis] for axis in order]).movedim((0, 1, 2), order).flatten(1, 2)
