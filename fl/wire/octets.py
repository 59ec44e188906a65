"""The codec of what is bytes already: uint8 tensors, as they are."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Generator, Tensor

from fl.wire.flat import Codec, WireError


def octets() -> Codec:
    """One byte a value; raises WireError for other dtypes, and when the bytes do not fill the shape."""

    def encode(tensor: Tensor, stream: Generator | None = None) -> np.ndarray:
        if tensor.dtype != torch.uint8:
            raise WireError(f"sealed tensors must be uint8, got {tensor.dtype}")
        return tensor.contiguous().reshape(-1).numpy()

    def decode(values: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        if values.size != math.prod(shape):
            raise WireError(f"shape {shape} needs {math.prod(shape)} bytes, got {values.size}")
        return torch.from_numpy(values if values.flags.writeable else values.copy()).reshape(shape)

    return Codec("octets", encode, decode)
