"""A folder of pictures: ``root/train/<class>/*`` and ``root/test/<class>/*``, any size, any format that Pillow reads."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import PositiveInt

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
    return Dataset(train, test, classes, dict(faults))


def _read(part: Path, classes: tuple[str, ...], side: int, faults: Counter[str]) -> Examples:
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted(p for p in (part / name).glob("*") if p.is_file() and not p.name.startswith(".")):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a picture with odd metadata is still a picture
                    with Image.open(path) as picture:
                        square = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
                        if picture.mode != "RGB":
                            faults[f"{part.name} converted"] += 1
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                faults[f"{part.name} skipped"] += 1
                continue
            images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
            labels.append(label)
    if not images:
        raise DataError(f"{part.name}/ must hold pictures, got none that can be read; see data.root")
    return Examples(torch.stack(images), torch.tensor(labels))
