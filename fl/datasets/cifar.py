"""CIFAR-10 and CIFAR-100 in torchvision's own files (Krizhevsky 2009), checked by torchvision's md5 sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import NonNegativeInt
from torchvision.datasets import CIFAR10, CIFAR100

from fl.datasets import DataError, Dataset, Examples
from fl.randomness import generator


def cifar10(image: int, root: str, download: bool = False, train: NonNegativeInt = 0, test: NonNegativeInt = 0) -> Dataset:
    """Ten classes, 50,000 + 10,000 images of 32 x 32 from ``root/cifar-10-batches-py``.

    ``train`` and ``test`` keep that many of them, the same ones always; 0 keeps all. Raises DataError.
    """
    return _read(CIFAR10, root, download, train, test)


def cifar100(image: int, root: str, download: bool = False, train: NonNegativeInt = 0, test: NonNegativeInt = 0) -> Dataset:
    """A hundred classes, 50,000 + 10,000 images of 32 x 32 from ``root/cifar-100-python``; otherwise as `cifar10`."""
    return _read(CIFAR100, root, download, train, test)


def _read(source: type[CIFAR10], root: str, download: bool, train: int, test: int) -> Dataset:
    folder = Path(root).expanduser()
    try:
        parts = [source(folder, train=part, download=download) for part in (True, False)]
    except Exception as error:
        reason = "the download failed" if download else "they are missing or damaged"
        raise DataError(
            f"{source.__name__} needs its files in {folder / source.base_folder}, but {reason} ({type(error).__name__}); "
            "set data.root to the folder that holds them, or data.download=true where there is a network"
        ) from None
    return Dataset(_examples(parts[0], train), _examples(parts[1], test), tuple(parts[0].classes), {})


def _examples(part: CIFAR10, keep: int) -> Examples:
    """(n, 32, 32, 3) pictures as (n, 3, 32, 32), all of them or ``keep`` drawn ones."""
    pixels = torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)))
    examples = Examples(pixels, torch.tensor(part.targets))
    order = torch.randperm(len(examples.labels), generator=generator(0, "cifar", "keep"))
    return examples.at(order[:keep].sort().values) if keep else examples
