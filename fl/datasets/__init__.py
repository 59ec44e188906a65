"""Sources of labelled images, one file each, and how they are cut into clients.

A dataset file holds a builder ``(image: int, ...) -> Dataset``; ``conf/data/<name>.yaml`` names it. ``image`` is the
side that the model reads, for sources that have no size of their own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DataError(ValueError):
    """Images that are missing or cannot be used; the message says what to do."""


class Examples(NamedTuple):
    """``images`` uint8 (n, 3, h, w) and ``labels`` int64 (n,)."""

    images: Tensor
    labels: Tensor

    def at(self, indices: Tensor) -> Examples:
        """The examples at ``indices`` (int64), in that order."""
        return Examples(self.images.index_select(0, indices), self.labels.index_select(0, indices))  # rows, not values


class Dataset(NamedTuple):
    """A source: its two parts, its class names in label order, and what had to be converted or left out.

    ``faults`` counts by kind, as in ``{"train skipped": 2, "test converted": 1}``; it is reported, never swallowed.
    """

    train: Examples
    test: Examples
    classes: tuple[str, ...]
    faults: dict[str, int]
