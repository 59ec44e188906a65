"""Few bits a value: blocks of values as integers times a scale, rounded by chance so that the mean is right.

    scale = max |x| / L over a block        q = floor(x / scale + u), u uniform in [0, 1)        x' = scale q
    L = 2^(bits - 1) - 1: 127 of 8 bits, 7 of 4

E[x'] = x and |x' - x| < scale, so that the errors of many clients cancel in their mean (Alistarh et al., arXiv 1610.02132); with
no stream the nearest integer is taken, and |x' - x| <= scale / 2. A scale is two bytes, bfloat16, rounded up. Layout: all
scales, then all integers, of 4 bits two in a byte, the first in the low half. Block by block, since a tensor's large values
would take the bits of its small ones: int8 in blocks of 256 costs 1.008 bytes a value, int4 in blocks of 64 0.531.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Generator, Tensor
from torch.nn.functional import pad

from fl.wire.flat import Codec, WireError


def quantised(bits: Literal[4, 8] = 8, block: PositiveInt = 256) -> Codec:
    """Integers of so many ``bits`` in blocks of ``block`` values, the last one as long as what is left.

    ``encode`` raises WireError for values that are not finite, ``decode`` when the bytes do not fill the shape.
    """
    most = 2 ** (bits - 1) - 1

    def encode(tensor: Tensor, stream: Generator | None = None) -> np.ndarray:
        x = finite(tensor).reshape(-1)
        x = pad(x, (0, -len(x) % block)).view(-1, block)
        scales = _rounded_up(x.abs().amax(1) / most)
        steps = x / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        chance = torch.rand(steps.shape, generator=stream) if stream else 0.5
        q = (steps + chance).floor_().clamp_(-most, most).to(torch.int8).view(-1)[: tensor.numel()]
        return np.concatenate([scales.view(torch.int16).numpy().astype("<i2", copy=False).view(np.uint8), _packed(q, bits)])

    def decode(octets: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        blocks = -(-count // block)
        needs = 2 * blocks + -(-count * bits // 8)
        if octets.size != needs:
            raise WireError(f"shape {shape} needs {needs} bytes in {bits} bits, got {octets.size}")
        words = np.ascontiguousarray(octets[: 2 * blocks]).view("<i2").astype(np.int16)
        scales = torch.from_numpy(words).view(torch.bfloat16).float()
        q = _unpacked(octets[2 * blocks :], bits, count).float()
        return (pad(q, (0, -count % block)).view(-1, block) * scales[:, None]).view(-1)[:count].reshape(shape)

    return Codec(f"int{bits}", encode, decode)


def finite(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, detached. Raises WireError unless all its values are finite."""
    x = tensor.detach().float()
    if not torch.isfinite(x).all():
        raise WireError("values must be finite to be quantised, got nan or inf; lower the learning rate")
    return x


def _rounded_up(scales: Tensor) -> Tensor:
    """float32 -> the least bfloat16 that is no smaller, so that no value of the block is beyond the largest integer."""
    short = scales.to(torch.bfloat16)
    return torch.where(short.float() < scales, (short.view(torch.int16) + 1).view(torch.bfloat16), short)


def _packed(q: Tensor, bits: int) -> np.ndarray:
    octets = q.numpy().view(np.uint8)
    if bits == 8:
        return octets
    nibbles = np.append(octets, np.zeros(octets.size % 2, np.uint8)) & 0x0F
    return nibbles[::2] | nibbles[1::2] << 4


def _unpacked(octets: np.ndarray, bits: int, count: int) -> Tensor:
    if bits == 8:
        return torch.from_numpy(np.ascontiguousarray(octets).view(np.int8).copy())
    nibbles = np.stack([octets & 0x0F, octets >> 4], axis=1).reshape(-1)[:count].astype(np.int8)
    return torch.from_numpy((nibbles ^ 8) - 8)  # two's complement of 4 bits
