"""An adapter as one flat uint8 array behind a small header, whatever the codec.

The header is JSON: ``[[name, shape, bytes], ...]`` in the order of the payload, tensors sorted by (group, name), so that
each group's bytes are contiguous. One array per message: every array of a Flower message costs half a kilobyte and a
request of its own.
"""

from __future__ import annotations

import json
from typing import Callable, Mapping, NamedTuple

import numpy as np
from torch import Tensor

from fl.adapter import GROUPS, Adapter, group


class WireError(ValueError):
    """A message that is no adapter; it says what does not fit."""


class Codec(NamedTuple):
    """How one float32 tensor becomes bytes: ``encode(t) -> uint8 (m,)``, ``decode(bytes, shape) -> float32``."""

    name: str
    encode: Callable[[Tensor], np.ndarray]
    decode: Callable[[np.ndarray, tuple[int, ...]], Tensor]


class Packed(NamedTuple):
    """An adapter ready to travel: its header and its payload, uint8 (n,)."""

    header: str
    payload: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of header and payload together, without what the transport adds."""
        return len(self.header.encode()) + self.payload.nbytes


def pack(adapter: Adapter, codec: Codec) -> Packed:
    """Encode every tensor (float32, any shape) and lay the results end to end."""
    names = sorted(adapter, key=lambda n: (GROUPS.index(group(n)), n))
    parts = [codec.encode(adapter[n]) for n in names]
    rows = [[n, list(adapter[n].shape), p.nbytes] for n, p in zip(names, parts)]
    return Packed(json.dumps(rows, separators=(",", ":")), np.concatenate(parts) if parts else np.zeros(0, np.uint8))


def unpack(packed: Packed, codec: Codec) -> Adapter:
    """The adapter that was packed. Raises WireError when header and payload do not fit each other."""
    try:
        rows = [(n, tuple(shape), size) for n, shape, size in json.loads(packed.header)]
        if not all(type(n) is str and all(type(d) is int and 0 <= d < 2**31 for d in (*shape, size)) for n, shape, size in rows):
            raise ValueError("a name, a list of sizes and a size")
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"a header must be a JSON list of [name, shape, bytes], got {packed.header[:60]!r} ({error})") from None
    if packed.payload.dtype != np.uint8 or packed.payload.ndim != 1:
        raise WireError(f"a payload must be uint8 (n,), got {packed.payload.dtype} {packed.payload.shape}")
    if sum(size for _, _, size in rows) != packed.payload.size:
        raise WireError(f"the header must describe all {packed.payload.size} bytes of the payload, got {sum(size for _, _, size in rows)}")
    if len({n for n, _, _ in rows}) != len(rows):
        raise WireError("a header must name each tensor once")
    adapter, at = {}, 0
    for name, shape, size in rows:
        adapter[name] = codec.decode(packed.payload[at : at + size], shape)
        at += size
    return adapter


def group_bytes(header: str) -> dict[str, int]:
    """Payload bytes of each group that the header lists."""
    sizes: dict[str, int] = {}
    for name, _, size in json.loads(header):
        sizes[group(name)] = sizes.get(group(name), 0) + size
    return sizes


def float32_bytes(tensors: Mapping[str, Tensor]) -> int:
    """`Packed.nbytes` of these tensors in float32, without packing them: what sending them all would cost."""
    rows = [[n, list(t.shape), 4 * t.numel()] for n, t in tensors.items()]
    return len(json.dumps(rows, separators=(",", ":")).encode()) + sum(size for _, _, size in rows)
