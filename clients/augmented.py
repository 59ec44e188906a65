"""What a client trains on under ``recipe.augment``: images before encryption, shifted and mirrored anew in every batch."""

from __future__ import annotations

from typing import Callable, Hashable

from torch import Generator, Tensor

from clients.holdings import Share
from clients.shelf import SHELF
from fl.ciphers import Cipher
from fl.config import Config
from fl.course import Prepare
from fl.datasets import Examples
from fl.datasets.images import augment, resize
from fl.lean.rows import augmenting
from fl.lean.table import spread


def augmented(
    config: Config, cipher: Cipher, share: Share, name: Hashable, plain: Callable[[], Examples]
) -> tuple[Examples, Prepare]:
    """The ``plain`` images of a ``share``, and what makes a batch of them what the model reads.

    The lean step reads blocks, which come of moves of bytes alone; for these the images lie spread on the shelf, under
    ``name``, where there is room. Otherwise each stage follows the other.
    """
    side, p = config.model["image"], config.model["patch"]
    one = share.source.images[:1]
    if config.step == "plain" or not cipher.moves:
        return plain(), stages(cipher, *one.shape[-2:], side)
    prepare = augmenting(cipher, *one.shape[-2:], side, p)
    if not SHELF.fits(config, name, share.size * spread(one).nbytes):
        return plain(), prepare

    def ready() -> Examples:
        images, labels = plain()
        return Examples(spread(images), labels)

    return SHELF.get(config, name, ready), prepare


def stages(cipher: Cipher, height: int, width: int, side: int) -> Prepare:
    """Augment, then resize, then encrypt: what `fl.lean.rows.augmenting` does, in pictures."""

    def batch(images: Tensor, chosen: Tensor, stream: Generator) -> Tensor:
        return cipher.encrypt(resize(augment(images.index_select(0, chosen.to(images.device)), stream), side))

    return Prepare(batch, anywhere=(height, width) == (side, side))
