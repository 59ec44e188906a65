"""Classify a folder of pictures with a run's model, plain or encrypted; and encrypt a folder of pictures.

    start     pictures    key           what happens
    keyed     plain       not needed    the model in plain order reads them: to rounding, what it answers to encrypted ones
    keyed     plain       given         encrypted in memory, and read by the patch embedding that absorbed the key
    keyed     encrypted   needed        read by the patch embedding that absorbed the key
    public    plain       needed        encrypted in memory: the model learnt the cipher and reads nothing else
    public    encrypted   not needed    read as they are
    (cipher=plain: no key anywhere)

Encrypted pictures are PNG files of the model's own size, as `encrypt_folder` writes them; they are not scaled, since that
would destroy them. The absorbed weights stay in this process. Arithmetic is in float32, as timm's model does it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Sequence

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from fl import keys
from fl.adapter import PATCH_EMBED
from fl.ciphers import Cipher
from fl.config import build
from fl.datasets.folder import pictures, read_picture
from fl.export.folder import Reading
from fl.export.released import reading, release
from fl.learn import plain

BATCH = 250  # pictures in memory
MARK = "veilora"  # the name of the text in an encrypted PNG; the text is the key's fingerprint


class PredictError(ValueError):
    """Pictures that cannot be classified or encrypted as asked; one line that says what to do."""


@torch.no_grad()
def predict(
    folder: Path, images: Path, key: Path | None = None, encrypted: bool = False, weights: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Classify ``images`` (``*`` and ``<class>/*``) with the model of a run or a timm export in ``folder``.

    Returns a JSON-able record: ``rows`` of file, class and probability; ``images`` and ``skipped``, how many were read and
    how many could not be; ``reads``, what the model was given; and where every picture lies in the folder of a class also
    ``correct`` and ``accuracy``. Raises PredictError, ExportError, KeyFileError, WeightsError and ConfigError.
    """
    model, way = release(folder, weights)
    cipher = _cipher(way, key)
    if cipher is None and way.ciphered and encrypted != way.encrypted:
        what = "encrypted pictures are read" if encrypted else "this model, of a public start, reads plain pictures"
        raise PredictError(f"{what} with the key alone (fingerprint {way.fingerprint}); say where its file is, --key")
    if cipher is not None and way.start == "keyed":
        _absorb(model, cipher)
    try:
        forward, images = plain(model.to(device)), images.expanduser()
    except (RuntimeError, AssertionError) as error:  # torch's two ways to say that there is no such device
        raise PredictError(f"device must be one that torch has, got {device!r} ({str(error).splitlines()[0][:80]}); leave it out for the CPU") from None
    files, rows = _files(images), []
    for batch in (files[i : i + BATCH] for i in range(0, len(files), BATCH)):
        found = _read(batch, way, encrypted)
        if not found:
            continue
        x = torch.stack(list(found.values()))
        x = cipher.encrypt(x) if cipher is not None and not encrypted else x
        best = forward(x.to(device)).softmax(-1).max(-1)
        rows += [
            {"file": path.relative_to(images).as_posix(), "class": way.classes[label], "probability": probability}
            for path, label, probability in zip(found, best.indices.tolist(), best.values.tolist())
        ]
    if not rows:
        raise PredictError(f"a folder of pictures must hold some that can be read, as * or <class>/*, got {images} and {len(files)} that cannot")
    reads = "encrypted" if way.ciphered and (encrypted or cipher is not None) else "plain"
    return {"rows": rows, "images": len(rows), "skipped": len(files) - len(rows), "reads": reads} | _accuracy(rows, way)


def encrypt_folder(folder: Path, images: Path, out: Path, key: Path) -> dict[str, Any]:
    """Write each picture of ``images`` scaled for the model in ``folder`` and encrypted, as PNG, to the new folder ``out``.

    ``<class>/bee.jpg`` becomes ``<class>/bee.jpg.png``. One plain picture beside its encrypted one gives the key: keep them
    apart. Returns a JSON-able record. Raises as `predict` does.
    """
    way = reading(folder)
    cipher, images, out = _cipher(way, key), images.expanduser(), out.expanduser()
    if not way.ciphered:
        raise PredictError("this run's pictures are plain (cipher=plain), so that there is nothing to encrypt with; take them as they are")
    if out.exists():
        raise PredictError(f"encrypted pictures need a new folder, got {out}, which exists; choose another")
    counts, marked = Counter(), PngInfo()
    marked.add_text(MARK, way.fingerprint)
    for path in _files(images):
        picture = read_picture(path, way.image)
        if picture is None:
            counts["skipped"] += 1
            continue
        place = out / path.relative_to(images).with_name(f"{path.name}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(cipher.encrypt(picture.image[None])[0].permute(1, 2, 0).contiguous().numpy()).save(place, pnginfo=marked)
        counts["images"] += 1
    return {"folder": str(out), "images": counts["images"], "skipped": counts["skipped"], "key_fingerprint": way.fingerprint}


def _cipher(way: Reading, path: Path | None) -> Cipher | None:
    """The run's cipher under the key in a file, None without a file. Raises PredictError for another key than the run's."""
    if path is None:
        return None
    key = keys.read(path)
    if way.fingerprint and key.fingerprint != way.fingerprint:
        raise PredictError(f"the key must be the run's, with fingerprint {way.fingerprint}, got {key.fingerprint}; name that key's file")
    return build(way.cipher, key=key, block=way.block)


@torch.no_grad()
def _absorb(model: nn.Module, cipher: Cipher) -> None:
    """Let the patch embedding read encrypted patches; the permuted weights never leave this process."""
    weight = model.get_parameter(PATCH_EMBED)
    weight.copy_(cipher.absorb(weight))


def _files(images: Path) -> list[Path]:
    """The pictures in ``images`` and in its sub-folders, by name."""
    if not images.is_dir():
        raise PredictError(f"pictures must be in a folder, as * or <class>/*, got {images}, which is none")
    parts = sorted(p for p in images.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [path for part in (images, *parts) for path in pictures(part)]


def _read(batch: Sequence[Path], way: Reading, encrypted: bool) -> dict[Path, Tensor]:
    """The pictures that can be read, uint8 (3, h, w), scaled unless ``encrypted``. Raises PredictError for what scaling or JPEG has spoilt."""
    if not encrypted and (marked := next((path for path in batch if _marked(path)), None)):
        raise PredictError(f"{marked} is encrypted already, as veilora encrypt marked it; say --encrypted, with its --key where the run's start was keyed")
    found = {path: read_picture(path, None if encrypted and way.ciphered else way.image) for path in batch}
    good = {path: picture.image for path, picture in found.items() if picture is not None}
    for path, image in good.items() if encrypted and way.ciphered else ():
        if image.shape[1:] != (way.image, way.image) or path.suffix.lower() != ".png":
            sides = f"{image.shape[2]} x {image.shape[1]}"
            raise PredictError(f"encrypted pictures must be PNG files of {way.image} x {way.image}, got {path} of {sides}; scale, encrypt, then save")
    return good


def _marked(path: Path) -> bool:
    """Whether `encrypt_folder` wrote this picture."""
    try:
        with Image.open(path) as picture:
            return MARK in picture.info
    except (OSError, ValueError, SyntaxError):
        return False


def _accuracy(rows: Sequence[dict[str, Any]], way: Reading) -> dict[str, Any]:
    truth = [row["file"].rpartition("/")[0] for row in rows]
    if strangers := sorted(set(truth) - {""} - set(way.classes)):
        return {"strangers": strangers}
    if "" in truth:
        return {}
    correct = sum(row["class"] == name for row, name in zip(rows, truth))
    return {"correct": correct, "accuracy": correct / len(rows)}
