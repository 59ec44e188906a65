"""What happens to pictures before encryption: augment, resize. After it their pixels have no neighbours."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import InterpolationMode
from torchvision.transforms.v2.functional import resize as scale


def resize(x: Tensor, side: int) -> Tensor:
    """uint8 (n, 3, h, w) -> uint8 (n, 3, side, side), bicubic with antialias; unchanged where it fits already."""
    return scaled(x, side, side)


def scaled(x: Tensor, height: int, width: int) -> Tensor:
    """uint8 (n, 3, h, w) -> uint8 (n, 3, height, width) on the CPU: another device rounds otherwise.

    Two passes, each rounded to bytes: first every row to its width, then every column to its height. What lies channels
    last takes two fifths of the time, and stays so.
    """
    return x if x.shape[-2:] == (height, width) else scale(x.cpu(), [height, width], InterpolationMode.BICUBIC, antialias=True)


def draw(n: int, height: int, stream: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """For n pictures: rows and columns to shift by, 0 to 2 * (height // 8), and whether to mirror, at odds 1/2.

    ``stream`` is the only source of chance; shifts and flips are drawn independently.
    """
    dy, dx = torch.randint(0, 2 * (height // 8) + 1, (2, n), generator=stream)
    return dy, dx, torch.randint(0, 2, (n,), generator=stream, dtype=torch.bool)


def framed(x: Tensor) -> Tensor:
    """(..., h, w) with the black beyond its edges into which `augment` shifts: (..., h + 2 reach, w + 2 reach), reach = h // 8."""
    return pad(x, (x.shape[-2] // 8,) * 4)


def augment(x: Tensor, stream: Generator) -> Tensor:
    """Each picture of uint8 (n, 3, h, w) shifted by up to h/8 pixels, black beyond its edge, and mirrored, as `draw` says."""
    n, _, h, w = x.shape
    dy, dx, flip = (choice[:, None] for choice in draw(n, h, stream))
    rows = dy + torch.arange(h)
    columns = dx + torch.where(flip, torch.arange(w).flip(0), torch.arange(w))
    picture, row, column = (i.to(x.device) for i in (torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]))
    return framed(x)[picture, :, row, column].permute(0, 3, 1, 2).contiguous()


def save_rows(rows: list[Tensor], path: Path, zoom: int = 1) -> None:
    """Write a PNG of pictures in rows; each row is uint8 (n, 3, h, w) with the same n, h and w."""
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).permute(1, 2, 0)
    picture = Image.fromarray(sheet.contiguous().numpy())
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
