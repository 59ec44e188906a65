"""What a client trains on under recipe.augment is the same images from the same draws, however they are made."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from clients.augmented import augmented
from clients.holdings import Share
from clients.shelf import SHELF
from fl.ciphers.pixel_shuffle import pixel_shuffle
from fl.datasets import Examples
from fl.lean.blocks import blocks
from fl.randomness import generator


@pytest.fixture(autouse=True)
def empty_shelf():
    yield
    SHELF.__init__()


def batch(key, size, side, chosen, **settings):
    """A batch as a client with these settings makes it, and the images that it made it from."""
    images = torch.randint(0, 256, (12, 3, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    share = Share(Examples(images, torch.arange(12)), torch.arange(2, 12))
    config = SimpleNamespace(model={"image": side, "patch": 8}, **{"step": "lean", "keep": 1} | settings)
    cipher = pixel_shuffle(key, 8)
    examples, prepare = augmented(config, cipher, share, "spread", share.examples)
    assert examples.labels.tolist() == list(range(2, 12)) and prepare.anywhere == (size == (side, side))
    return prepare.batch(examples.images, chosen, generator(0, "x")), examples.images


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_room_on_the_shelf_and_the_kind_of_step_change_how_a_batch_is_made_and_not_what_it_is(key, size):
    chosen = torch.tensor([9, 0, 3, 4, 4, 7])
    expected, plain = batch(key, size, 16, chosen, step="plain")
    spread, wide = batch(key, size, 16, chosen)
    room = wide.nbytes / 1e9
    short, narrow = batch(key, size, 16, chosen, keep=0.99 * room)
    assert plain.shape == narrow.shape == (10, 3, *size) and wide.ndim == 5
    assert expected.ndim == 4 and all(torch.equal(made, blocks(expected, 8)) for made in (spread, short))


def test_what_lies_spread_on_the_shelf_is_not_spread_again(key):
    _, once = batch(key, (16, 16), 16, torch.arange(10))
    _, again = batch(key, (16, 16), 16, torch.arange(10))
    assert once is again
