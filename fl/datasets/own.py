"""One client's pictures in a folder of its own: the file format.

    <folder>/partition.safetensors   train.images uint8 (n, 3, h, w), train.labels int64 (n,), and so for validation and test
             partition.json          whose they are, how they were cut, whether they are encrypted, the SHA-256 of the above

Both are written whole or not at all, the tensors first: a folder without ``partition.json`` is none. Reading checks every
byte, and leaves the pictures in the page cache, not in the process.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Callable, Literal, Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fl.datasets import DataError, Examples

TENSORS, FACTS = "partition.safetensors", "partition.json"
PARTS = ("train", "validation", "test")


class Encrypted(BaseModel):
    """With what the pictures were encrypted: the key's fingerprint, the cipher's config, the block in pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: str
    cipher: dict[str, Any]
    block: int


class Facts(BaseModel):
    """What is known of a folder's pictures. ``cut`` is the config they were cut by, None where all are the client's own.

    ``split`` is the digest of the whole cut, the same for all clients; ``image`` the side that the model reads. Encrypted
    pictures have that side already.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    index: int = Field(ge=0)
    of: int = Field(ge=1)
    classes: tuple[str, ...]
    split: str
    cut: dict[str, Any] | None
    faults: dict[str, int]
    image: int
    encrypted: Encrypted | None
    sha256: str = ""
    nbytes: int = 0


def write(folder: Path, facts: Facts, parts: Mapping[str, Examples]) -> None:
    """Write ``parts``, by the names in ``PARTS``, to a ``folder`` that is new or empty (mode 0700; its files 0600).

    Raises DataError when something lies there, OSError when the disk does not take it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"a partition must not be written over another thing: {folder} is not empty; choose another folder or remove it")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    tensors = {f"{name}.{field}": t.contiguous() for name in PARTS for field, t in parts[name]._asdict().items()}
    _place(folder / TENSORS, lambda path: save_file(tensors, path))
    digest, nbytes = _sha256(folder / TENSORS), (folder / TENSORS).stat().st_size
    told = facts.model_copy(update={"sha256": digest, "nbytes": nbytes}).model_dump(mode="json")
    text = json.dumps({"facts": told, "sha256": _of(told)}, indent=2) + "\n"
    _place(folder / FACTS, lambda path: path.write_text(text))


def read(folder: Path) -> tuple[Facts, dict[str, Examples]]:
    """The facts, and the examples of each of ``PARTS``, every byte as it was written.

    Raises DataError, naming the file, for what is missing, damaged, cut short, or of another version.
    """
    again = "write it anew with: veilora partition"
    try:
        written = json.loads((folder / FACTS).read_bytes())
        told, digest = written["facts"], written["sha256"]
    except OSError as error:
        raise DataError(f"{folder} must be a folder that veilora partition wrote, but {FACTS} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{FACTS} in {folder} must be as it was written, but is damaged; {again}") from None
    if isinstance(told, dict) and told.get("version", 1) != 1:
        raise DataError(f"{FACTS} in {folder} must be of version 1, got {told['version']!r}; {again}, of this code")
    if digest != _of(told):
        raise DataError(f"{FACTS} in {folder} must be as it was written, but its SHA-256 is another; {again}")
    try:
        facts, path = Facts.model_validate(told), folder / TENSORS
        found = path.stat().st_size
        if found != facts.nbytes:
            raise DataError(f"{TENSORS} in {folder} must have {facts.nbytes} bytes, got {found}; {again}")
        if (got := _sha256(path)) != facts.sha256:
            raise DataError(f"{TENSORS} in {folder} must have the SHA-256 {facts.sha256[:16]}..., got {got[:16]}...: it is damaged; {again}")
        tensors = load_file(path)
        return facts, {name: Examples(tensors[f"{name}.images"], tensors[f"{name}.labels"]) for name in PARTS}
    except OSError as error:
        raise DataError(f"{folder} must hold {TENSORS}, but it cannot be read ({error.strerror}); {again}") from None
    except (ValidationError, SafetensorError, KeyError):
        raise DataError(f"{folder} must be of this code's format, got another; {again}") from None


def _place(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let ``fill`` write a file, mode 0600, that is at ``path`` once all of it is on the disk."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        fill(fresh)
        fresh.chmod(0o600)
        for place in (fresh, path.parent):
            handle = os.open(place, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
            if place == fresh:
                os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
