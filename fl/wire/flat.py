"""An adapter as one flat uint8 array behind a small header, whatever the codec.

The header is JSON: ``[[name, shape, bytes], ...]`` in the order of the payload, tensors sorted by (group, name), so that
each group's bytes are contiguous. One array per message: every array of a Flower message costs half a kilobyte and a
request of its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable, Mapping, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from fl.adapter import Adapter, group, ordered
from fl.flat import Flat, Layout


class WireError(ValueError):
    """A message that is no adapter; it says what does not fit."""


class Codec(NamedTuple):
    """How one float32 tensor becomes bytes: ``encode(t, stream) -> uint8 (m,)``, ``decode(bytes, shape) -> float32``.

    ``stream`` is where a codec that rounds by chance has its chance from; without one it rounds to the nearest. ``view`` is
    for a codec whose bytes are the values themselves: the whole payload as float32 (n,), without a copy.
    """

    name: str
    encode: Callable[..., np.ndarray]
    decode: Callable[[np.ndarray, tuple[int, ...]], Tensor]
    view: Callable[[np.ndarray], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter ready to travel: its header and its payload, uint8 (n,)."""

    header: str
    payload: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of header and payload together, without what the transport adds."""
        return len(self.header.encode()) + self.payload.nbytes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What the header says of each tensor. Raises WireError as `check` does."""
        self.check()
        return {name: shape for name, shape, _ in _rows(self.header)}

    def check(self) -> None:
        """Raise WireError unless the header can be read and describes the payload."""
        described = _total(self.header)
        if self.payload.dtype != np.uint8 or self.payload.ndim != 1:
            raise WireError(f"a payload must be uint8 (n,), got {self.payload.dtype} {self.payload.shape}")
        if described != self.payload.size:
            raise WireError(f"the header must describe all {self.payload.size} bytes of the payload, got {described}")


Codecs = Codec | Mapping[str, Codec]
"""One codec for all tensors, or one for each group."""


def pack(adapter: Adapter, codec: Codecs, stream: Generator | None = None) -> Packed:
    """Encode every tensor (float32, any shape) and lay the results end to end; ``stream`` as in `Codec`."""
    if isinstance(adapter, Flat) and isinstance(codec, Codec) and codec.view:
        rows = tuple((name, shape, 4 * math.prod(shape)) for name, shape in adapter.layout)
        return Packed(_header(rows), aligned(codec.encode(adapter.buffer)))
    names = ordered(adapter)
    parts = [_of(codec, n).encode(adapter[n], stream) for n in names]
    rows = tuple((n, tuple(adapter[n].shape), p.nbytes) for n, p in zip(names, parts))
    return Packed(_header(rows), np.concatenate(parts) if parts else np.zeros(0, np.uint8))


def aligned(octets: np.ndarray) -> np.ndarray:
    """A copy of uint8 (n,) where torch would put it, at a multiple of 64 bytes: adding what lies elsewhere takes a tenth longer."""
    copy = torch.empty(octets.shape, dtype=torch.uint8).numpy()
    copy[:] = octets
    return copy


def packer(codec: Codec) -> Callable[[Adapter], Packed]:
    """`pack` that packs an adapter once, however many clients in a row receive it."""
    last: list = [None, None]

    def once(adapter: Adapter) -> Packed:
        if last[0] is not adapter:
            last[:] = adapter, pack(adapter, codec)
        return last[1]

    return once


def _of(codec: Codecs, name: str) -> Codec:
    if isinstance(codec, Codec):
        return codec
    if group(name) not in codec:
        raise WireError(f"there must be a codec for the group of {name}, got codecs for {', '.join(codec)}")
    return codec[group(name)]


def unpack(packed: Packed, codec: Codecs) -> Adapter:
    """The adapter that was packed, a view of the payload where the codec has one.

    Raises WireError when header and payload do not fit each other.
    """
    packed.check()
    if isinstance(codec, Codec) and codec.view:
        return Flat(codec.view(packed.payload), _layout(packed.header))
    adapter, at = {}, 0
    for name, shape, size in _rows(packed.header):
        adapter[name] = _of(codec, name).decode(packed.payload[at : at + size], shape)
        at += size
    return adapter


def group_bytes(header: str) -> dict[str, int]:
    """Payload bytes of each group that the header lists."""
    return dict(_group_bytes(header))


def float32_bytes(tensors: Mapping[str, Tensor]) -> int:
    """`Packed.nbytes` of these tensors in float32, without packing them: what sending them all would cost."""
    rows = tuple((n, tuple(t.shape), 4 * t.numel()) for n, t in tensors.items())
    return len(_header(rows).encode()) + sum(size for _, _, size in rows)


# Every message of a run has one of a few headers: each is written and read once. A stranger's are bounded before that.
LONGEST = 2**20  # characters; a thousand tensors take a tenth of it


@lru_cache(maxsize=64)
def _header(rows: tuple) -> str:
    return json.dumps(rows, separators=(",", ":"))


def _rows(header: str) -> list[tuple[str, tuple[int, ...], int]]:
    if len(header) > LONGEST:
        raise WireError(f"a header must have at most {LONGEST} characters, got {len(header)}")
    return _rows_of(header)


@lru_cache(maxsize=64)
def _rows_of(header: str) -> list[tuple[str, tuple[int, ...], int]]:
    try:
        rows = [(n, tuple(shape), size) for n, shape, size in json.loads(header)]
        if not all(type(n) is str and all(type(d) is int and 0 <= d < 2**31 for d in (*shape, size)) for n, shape, size in rows):
            raise ValueError("a name, a list of sizes and a size")
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"a header must be a JSON list of [name, shape, bytes], got {header[:60]!r} ({error})") from None
    for name, shape, _ in rows:
        if len(shape) > 8 or math.prod(d for d in shape if d) >= 2**40:
            raise WireError(f"a shape must have at most 8 sizes that multiply to less than 2^40, got {str(shape)[:60]} for {name[:60]}")
    if len({n for n, _, _ in rows}) != len(rows):
        raise WireError("a header must name each tensor once")
    return rows


@lru_cache(maxsize=64)
def _total(header: str) -> int:
    return sum(size for _, _, size in _rows(header))


@lru_cache(maxsize=64)
def _layout(header: str) -> Layout:
    for name, shape, size in _rows(header):
        if size != 4 * math.prod(shape):
            raise WireError(f"shape {shape} of {name} needs {4 * math.prod(shape)} bytes in float32, got {size}")
    return tuple((name, shape) for name, shape, _ in _rows(header))


@lru_cache(maxsize=64)
def _group_bytes(header: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, _, size in json.loads(header):
        sizes[group(name)] = sizes.get(group(name), 0) + size
    return sizes
