"""The codecs of two bytes a value: bfloat16, which has float32's range, and float16, which has eight times its resolution."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from fl.wire.flat import Codec, WireError


def half(kind: Literal["bfloat16", "float16"] = "bfloat16") -> Codec:
    """Each value rounded to the nearest of its ``kind``, little-endian.

    ``encode`` raises WireError for a finite value that the kind cannot hold (float16: beyond 65,504), ``decode`` when the bytes
    do not fill the shape.
    """
    dtype = getattr(torch, kind)

    def encode(tensor: Tensor, stream: Generator | None = None) -> np.ndarray:
        short = tensor.detach().reshape(-1).to(dtype)
        if not torch.isfinite(short).all():
            raise WireError(f"values must be finite in {kind}, got up to {float(tensor.abs().max()):g}; choose codec=float32")
        return short.view(torch.int16).numpy().astype("<i2", copy=False).view(np.uint8)

    def decode(octets: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        if octets.size != 2 * math.prod(shape):
            raise WireError(f"shape {shape} needs {2 * math.prod(shape)} bytes in {kind}, got {octets.size}")
        words = np.ascontiguousarray(octets).view("<i2").astype(np.int16)
        return torch.from_numpy(words).view(dtype).float().reshape(shape)

    return Codec(kind, encode, decode)
