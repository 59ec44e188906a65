"""What a client trains on: its images, the order in which they come, and how a batch of them is made.

    examples (all) -> chosen by the stream -> prepare -> a batch as the model reads it
"""

from __future__ import annotations

from typing import Callable, Iterator, NamedTuple

import torch
from torch import Generator, Tensor

from fl.adapter import Adapter
from fl.datasets import Examples
from fl.pieces import resident
from fl.recipe import Recipe


class Prepare(NamedTuple):
    """How the images of a batch become what the model reads: augmented, resized, encrypted.

    ``batch`` takes all images (uint8), which of them (int64, on the CPU), and chance. Unless it works ``anywhere``, with what
    comes out where the images are, these stay on the CPU.
    """

    batch: Callable[[Tensor, Tensor, Generator], Tensor]
    anywhere: bool = True


ROWS = Prepare(lambda images, chosen, stream: images.index_select(0, chosen.to(images.device)))
"""The images as they are."""


class Course(NamedTuple):
    """What one client trains on; ``stream`` decides the order of the ``examples`` and what ``prepare`` draws.

    ``correction`` is added to the gradient of each step, before it is clipped.
    """

    examples: Examples
    stream: Generator
    prepare: Prepare = ROWS
    correction: Adapter | None = None

    def batches(self, recipe: Recipe, device: torch.device) -> Iterator[Examples]:
        """What each step reads. A GPU gets the images once, where ``prepare`` works there and they leave it room."""
        images, labels = self.examples
        images = resident(images, device) if self.prepare.anywhere else images
        for chosen in _batches(len(labels), recipe, self.stream):
            yield Examples(self.prepare.batch(images, chosen, self.stream), labels[chosen])


def steps_of(n: int, batch: int) -> int:
    """How many steps an epoch over ``n`` images has."""
    return n // batch + (n % batch > 1) if n >= batch else 1


def _batches(n: int, recipe: Recipe, stream: Generator) -> Iterator[Tensor]:
    """Index batches, reshuffled every epoch; a last batch of one image joins the batch before it."""
    for _ in range(recipe.epochs):
        parts = list(torch.randperm(n, generator=stream).split(recipe.batch))
        if len(parts[-1]) == 1 and len(parts) > 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        yield from parts
