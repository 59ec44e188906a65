"""A folder of pictures: ``root/train/<class>/*`` and ``root/test/<class>/*``, any size, any format that Pillow reads."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import PositiveInt
from torch import Tensor

from fl.datasets import DataError, Dataset, Examples


def image_folder(image: PositiveInt, root: str) -> Dataset:
    """Pictures scaled and centre-cropped to ``image`` x ``image``; class names are the sub-folders of ``root/train``.

    Grey, palette and transparent pictures are converted to RGB and counted; what cannot be read is skipped and counted.
    Raises DataError when a part is missing or empty, or when ``test`` has a class that ``train`` lacks.
    """
    folder = Path(root).expanduser()
    faults: Counter[str] = Counter()
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        raise DataError(f"an image folder must hold train/<class>/* and test/<class>/*, got {folder}; see data.root")
    classes = tuple(sorted(p.name for p in (folder / "train").iterdir() if p.is_dir()))
    strangers = {p.name for p in (folder / "test").iterdir() if p.is_dir()} - set(classes)
    if strangers:
        raise DataError(f"test/ must have only classes of train/, got {sorted(strangers)} besides; rename or remove them")
    train, test = (_read(folder / part, classes, image, faults) for part in ("train", "test"))
    return Dataset(train, test, classes, dict(+faults))


def pictures(folder: Path) -> list[Path]:
    """The files that are to be read as pictures, by name; hidden ones are passed over."""
    return sorted(p for p in folder.glob("*") if p.is_file() and not p.name.startswith("."))


class Picture(NamedTuple):
    """``image`` uint8 (3, side, side), and whether it had to be converted to RGB."""

    image: Tensor
    converted: bool


def read_picture(path: Path, side: int | None) -> Picture | None:
    """The picture in a file, scaled and centre-cropped to ``side`` (None: as it is); None for what cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a picture with odd metadata is still a picture
            with Image.open(path) as picture:
                square = picture.convert("RGB")
                if side is not None:
                    square = ImageOps.fit(square, (side, side), Image.Resampling.BICUBIC)
                return Picture(torch.from_numpy(np.array(square)).permute(2, 0, 1), picture.mode != "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _read(part: Path, classes: tuple[str, ...], side: int, faults: Counter[str]) -> Examples:
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in pictures(part / name):
            found = read_picture(path, side)
            if found is None:
                faults[f"{part.name} skipped"] += 1
                continue
            faults[f"{part.name} converted"] += found.converted
            images.append(found.image)
            labels.append(label)
    if not images:
        raise DataError(f"{part.name}/ must hold pictures, got none that can be read; see data.root")
    return Examples(torch.stack(images), torch.tensor(labels))
