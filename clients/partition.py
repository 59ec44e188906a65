"""Write one client's pictures to a folder of its own, so that its machine holds no others; encrypted, if wanted.

A run whose nodes have such folders (``own`` in the config, ``partition-path`` in a node's settings) gives the adapter that
the simulation on the whole source gives, bit for bit.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from clients.holdings import cut, cut_by, whole
from fl import durable, keys
from fl.config import Config, ConfigError, build
from fl.datasets import DataError, Examples
from fl.datasets.images import resize
from fl.datasets.own import PARTS, Encrypted, Facts, read
from fl.datasets.own import write as store
from fl.datasets.partition import Split, iid, split

OWN = hashlib.sha256(b"every client has pictures of its own").hexdigest()[:16]  # in a split's digest's place: nothing was cut


def write(config: Config, index: int, of: int, out: Path, encrypt: bool = False, own: bool = False) -> dict[str, Any]:
    """Write the share of client ``index`` (from 0) of ``of`` to the folder ``out``, cut as the simulation cuts it.

    With ``own`` all of ``config.data`` is this client's, and nothing is cut but what it holds out. With ``encrypt`` pictures
    are resized and encrypted before they touch the disk. Returns what is there: images by part and class, and digests.
    Raises ConfigError, DataError, KeyFileError or OSError, each with one line.
    """
    if not 0 <= index < of:
        raise ConfigError(f"a client's number must be at least 0 and below how many there are, got --index {index} --of {of}")
    if config.own:
        raise ConfigError(f"a partition is cut from data, got own={config.own}; leave own out")
    source, out = whole(config), out.expanduser()
    labels = source.train.labels, source.test.labels
    parts, place = (split(iid(), *labels, 1, config.seed, config.validation), 0) if own else (cut(config, of), index)
    shares = _shares(config, parts, place)
    sealed = None
    if encrypt:
        key = keys.read(Path(config.key))
        shares, sealed = _encrypted(config, key, shares)
    facts = Facts(
        index=index, of=of, classes=source.classes, split=OWN if own else parts.digest(), cut=None if own else cut_by(config),
        faults=source.faults, image=config.model["image"], encrypted=sealed,
    )  # fmt: skip
    store(out, facts, shares)
    counts = {part: torch.bincount(shares[part].labels, minlength=len(source.classes)).tolist() for part in PARTS}
    return {
        "folder": str(out.resolve()),
        "client": index,
        "of": of,
        "own": own,
        "images": {part: len(shares[part].labels) for part in PARTS},
        "by_class": {part: dict(zip(source.classes, found)) for part, found in counts.items()},
        "side": list(shares["train"].images.shape[-2:]),
        "split": facts.split,
        "faults": source.faults,
        "encrypted": sealed.model_dump() if sealed else None,
    }


def reencrypt(folder: Path, old: Path, new: Path) -> dict[str, Any]:
    """Encrypt the pictures in ``folder`` under the key file ``new`` in place of ``old``, whole or not at all.

    The fresh folder is complete on the disk before it takes the place of the old one, which is removed after that. Where
    this is broken off, the same command goes on. Returns what is there. Raises DataError, KeyFileError or OSError.
    """
    folder = folder.expanduser().absolute()
    fresh, before = (folder.with_name(f".{folder.name}.{part}") for part in ("fresh", "before"))
    if not folder.exists() and before.exists():  # broken off between the two renames
        before.rename(folder)
    facts, parts = read(folder)
    ours, theirs = keys.read(new), keys.read(old)
    if facts.encrypted and facts.encrypted.key == ours.fingerprint:
        shutil.rmtree(before, ignore_errors=True)  # broken off after them
        return _told(folder, facts)
    if facts.encrypted is None or facts.encrypted.key != theirs.fingerprint:
        was = f"with key {facts.encrypted.key}" if facts.encrypted else "not at all"
        says = f"{folder} must be encrypted with --old, key {theirs.fingerprint}, but is encrypted {was}"
        raise DataError(f"{says}; name the key that it was written with")
    was, now = (build(facts.encrypted.cipher, key=key, block=facts.encrypted.block) for key in (theirs, ours))
    turned = {name: Examples(now.encrypt(was.decrypt(images)), labels) for name, (images, labels) in parts.items()}
    shutil.rmtree(fresh, ignore_errors=True)
    facts = facts.model_copy(update={"encrypted": facts.encrypted.model_copy(update={"key": ours.fingerprint})})
    store(fresh, facts, turned)
    owner = folder.stat()
    for path in (fresh, *fresh.iterdir()):
        os.chown(path, owner.st_uid, owner.st_gid)  # root did this for a service's user
    shutil.rmtree(before, ignore_errors=True)
    folder.rename(before)
    fresh.rename(folder)
    durable.sync(folder.parent)
    shutil.rmtree(before)
    return _told(folder, facts)


def _told(folder: Path, facts: Facts) -> dict[str, Any]:
    return {"folder": str(folder), "client": facts.index, "encrypted": facts.encrypted.model_dump()}


def _shares(config: Config, parts: Split, place: int) -> dict[str, Examples]:
    source = whole(config)
    pools = {"train": source.train, "validation": source.train, "test": source.test}
    return {part: pool.at(getattr(parts, part)[place]) for part, pool in pools.items()}


def _encrypted(config: Config, key: keys.SharedKey, shares: dict[str, Examples]) -> tuple[dict[str, Examples], Encrypted]:
    """The images as the model reads them, and with what they were encrypted. Raises ConfigError for a cipher that is none."""
    side, block = config.model["image"], config.model["patch"]
    cipher = build(config.cipher, key=key, block=block)
    resized = {part: Examples(resize(examples.images, side), examples.labels) for part, examples in shares.items()}
    hidden = {part: Examples(cipher.encrypt(examples.images), examples.labels) for part, examples in resized.items()}
    if torch.equal(hidden["train"].images, resized["train"].images):
        raise ConfigError(f"encrypting needs a cipher that does, got cipher {config.cipher['_target_']}; set cipher=pixel_shuffle")
    return hidden, Encrypted(key=key.fingerprint, cipher=config.cipher, block=block)
