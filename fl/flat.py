"""Many named tensors in one buffer: what a step optimises, a message carries and a server adds is a single array.

    buffer      0 .......... 768 ........ 1536 ................ 148,992
    tensors     |  q.lora_a   |  v.lora_a  |  patch_embed.proj  |        by (group, name): each group is one slice

An operation on a buffer costs one call; on 52 tensors it costs 52, which is most of the time of adding small adapters. Of C
clients that train together the buffer is (C, n), a row each, and a tensor (C, ...).
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Iterator, Mapping

from torch import Tensor

Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""(name, shape) of each tensor, in the order of the buffer."""


class Flat(Mapping[str, Tensor]):
    """An adapter whose tensors are views of one ``buffer`` (n,) or (C, n), laid out by ``layout``; made when they are asked for."""

    def __init__(self, buffer: Tensor, layout: Layout) -> None:
        self.buffer, self.layout = buffer, layout

    @cached_property
    def _places(self) -> dict[str, tuple[int, int, tuple[int, ...]]]:
        return places(self.layout)  # when a tensor is asked for: a server that adds buffers asks for none

    def __getitem__(self, name: str) -> Tensor:
        start, end, shape = self._places[name]
        return self.buffer[..., start:end].view((*self.buffer.shape[:-1], *shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __or__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(self) | dict(other)

    def __ror__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(other) | dict(self)


@lru_cache(maxsize=64)
def places(layout: Layout) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """Where each tensor lies in the buffer: start, end and shape, by name."""
    found, at = {}, 0
    for name, shape in layout:
        found[name] = (at, at := at + math.prod(shape), shape)
    return found
