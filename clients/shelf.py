"""Prepared images that a process keeps, as many as fit."""

from __future__ import annotations

from typing import Callable, Hashable

from fl.config import Config
from fl.datasets import Examples


class Shelf:
    """The partitions of one config that a process keeps ready, as many as fit in ``config.keep`` gigabytes.

    What came first stays: clients take turns, and whoever makes room for the newest in a circle never finds anything.
    """

    def __init__(self) -> None:
        self.config: Config | None = None
        self.kept: dict[Hashable, Examples] = {}

    def fits(self, config: Config, name: Hashable, nbytes: int) -> bool:
        """Whether something lies under ``name``, or images of ``nbytes`` would find room."""
        kept = self.kept if config == self.config else {}
        return name in kept or nbytes + sum(e.images.nbytes for e in kept.values()) <= config.keep * 1e9

    def get(self, config: Config, name: Hashable, make: Callable[[], Examples]) -> Examples:
        """What lies under ``name``; made, and laid there if there is room, when nothing does."""
        if config != self.config:
            self.config, self.kept = config, {}
        if name in self.kept:
            return self.kept[name]
        examples = make()
        if self.fits(config, name, examples.images.nbytes):
            self.kept[name] = examples
        return examples


SHELF = Shelf()
