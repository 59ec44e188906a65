"""What the tests of several rooms share: one key, a tiny vision transformer, forty pictures that it can learn."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fl.datasets import Examples
from fl.keys import SharedKey
from fl.models.vit import vit

torch.set_num_threads(1)
SLOW = 900  # seconds
TINY = {"name": "vit_tiny_patch16_224", "embed_dim": 16, "depth": 2, "num_heads": 2}


def first(n: int, values: list) -> list:
    """Of the ``values`` of a parameter the first n for the fast suite; the others are in the slow one."""
    return [value if i < n else pytest.param(value, marks=pytest.mark.slow) for i, value in enumerate(values)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow test has more time than the limit of pyproject.toml, unless it names a limit of its own."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW))


@pytest.fixture(scope="session", autouse=True)
def fastest(tmp_path_factory):
    """What `auto` chooses is measured in and kept for these tests alone, in the processes that they start, too."""
    os.environ["VEILORA_FASTEST"] = str(tmp_path_factory.mktemp("fastest"))


@pytest.fixture
def key() -> SharedKey:
    return SharedKey(bytes(range(32)))


@pytest.fixture
def tiny():
    """A builder of ViTs of width 16 with two blocks, 16 x 16 pictures in 8 x 8 patches, three classes; always the same."""

    def build(method=None, seed: int = 0, **change):
        model = vit(**(TINY | {"image": 16, "patch": 8, "classes": 3, "weights": "none"} | change))
        if method:
            method(model, seed)
        return model

    return build


@pytest.fixture
def forty() -> Examples:
    """Forty noisy pictures of 16 x 16 whose brightest channel is their label."""
    stream = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % 3
    images = torch.randint(0, 120, (40, 3, 16, 16), generator=stream, dtype=torch.uint8)
    images[torch.arange(40), labels] += 90
    return Examples(images, labels)


@pytest.fixture
def shared() -> Path:
    """The folder beside the checkout that holds weights and data too large for it."""
    return Path(__file__).resolve().parents[1].parent / "shared"
