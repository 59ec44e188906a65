"""A matrix as the product of two thin ones: what a patch embedding's difference is for the most part.

    X (d, m) -> U S V^T, the first r of it        L = U sqrt(S) (d, r),  R = sqrt(S) V^T (r, m)        X' = L R

The best approximation of rank r (Eckart-Young), its two factors alike in size, in integers of few bits. ViT-B/16's patch
embedding, 768 x 768, takes 6,144 values at r = 4 instead of 589,824. What is cut off is lost unless error feedback keeps it.
A tensor that is no matrix (a bias), or for which two factors are no saving, goes as integers itself.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Generator, Tensor

from fl.wire.flat import Codec
from fl.wire.quantised import finite, quantised


def low_rank(rank: PositiveInt = 4, bits: Literal[4, 8] = 8, block: PositiveInt = 256) -> Codec:
    """The first ``rank`` singular vectors on either side, `quantised`; shape (d, ...) counts as (d, m)."""
    inner = quantised(bits, block)

    def sides(shape: tuple[int, ...]) -> tuple[int, int] | None:
        """d and m, if it is worth it."""
        if len(shape) < 2:
            return None
        d, m = shape[0], math.prod(shape[1:])
        return (d, m) if rank * (d + m) < d * m else None

    def encode(tensor: Tensor, stream: Generator | None = None) -> np.ndarray:
        if not sides(tuple(tensor.shape)):
            return inner.encode(tensor, stream)
        u, s, vt = torch.linalg.svd(finite(tensor).flatten(1), full_matrices=False)
        root = s[:rank].sqrt()
        return inner.encode(torch.cat([(u[:, :rank] * root).reshape(-1), (root[:, None] * vt[:rank]).reshape(-1)]), stream)

    def decode(octets: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        if not (found := sides(shape)):
            return inner.decode(octets, shape)
        d, m = found
        left, right = inner.decode(octets, (rank * (d + m),)).split([d * rank, rank * m])
        return (left.view(d, rank) @ right.view(rank, m)).reshape(shape)

    return Codec(f"rank {rank} in {inner.name}", encode, decode)
