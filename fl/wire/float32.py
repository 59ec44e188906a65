"""The codec that loses nothing: little-endian float32."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Generator, Tensor

from fl.wire.flat import Codec, WireError


def float32() -> Codec:
    """Four bytes a value; ``decode`` raises WireError when the bytes do not fill the shape."""

    def encode(tensor: Tensor, stream: Generator | None = None) -> np.ndarray:
        if tensor.dtype != torch.float32:
            raise WireError(f"the float32 codec takes float32 tensors, got {tensor.dtype}")
        return tensor.detach().contiguous().reshape(-1).numpy().astype("<f4", copy=False).view(np.uint8)

    def decode(octets: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        if octets.size != 4 * math.prod(shape):
            raise WireError(f"shape {shape} needs {4 * math.prod(shape)} bytes in float32, got {octets.size}")
        return view(octets).reshape(shape)

    def view(octets: np.ndarray) -> Tensor:
        values = np.ascontiguousarray(octets).view("<f4").astype(np.float32, copy=False)
        return torch.from_numpy(values if values.flags.writeable and values.flags.aligned else values.copy())

    return Codec("float32", encode, decode, view)
