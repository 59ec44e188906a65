"""What a client has to train and test on: its share of a source that all machines hold, or a folder of its own."""

from __future__ import annotations

import hmac
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fl.config import Config, build
from fl.datasets import DataError, Dataset, Examples, own
from fl.datasets.partition import Split, split
from fl.keys import SharedKey


class Share(NamedTuple):
    """The rows ``at`` (int64) of a source; None, all of them."""

    source: Examples
    at: Tensor | None = None

    @property
    def size(self) -> int:
        """How many images they are."""
        return len(self.source.labels if self.at is None else self.at)

    def examples(self) -> Examples:
        """The images; a copy where they are rows of a source that others share."""
        return self.source if self.at is None else self.source.at(self.at)


class Holdings(NamedTuple):
    """One client's images by part, and what the roll call asks of them.

    ``digest`` is that of the whole split; ``split`` is the split itself, where this machine holds the whole source.
    ``encrypted`` images are as the model reads them; ``name`` tells the pictures of one folder from those of another.
    """

    train: Share
    validation: Share
    test: Share
    classes: tuple[str, ...]
    faults: dict[str, int]
    digest: str
    split: Split | None = None
    encrypted: bool = False
    name: str = ""

    def named(self, key: SharedKey | None) -> str:
        """Sixteen hex digits of the classes' names in their order, under the key: who has it not cannot try names from a dictionary.

        None, where sites have no image key in common, is no protection: a dictionary of names finds them.
        """
        return hmac.digest(key.stream("classes", 32) if key else bytes(32), json.dumps(self.classes).encode(), "sha256").hex()[:16]


def holdings(config: Config, index: int, of: int, key: SharedKey) -> Holdings:
    """What client ``index`` of ``of`` has: the folder ``config.own``, or its share of ``config.data``. Raises DataError."""
    if config.own:
        return _stored(config, index, of, key)
    source, parts = whole(config), cut(config, of)
    pools = {"train": source.train, "validation": source.train, "test": source.test}
    shares = {part: Share(pool, getattr(parts, part)[index]) for part, pool in pools.items()}
    return Holdings(**shares, classes=source.classes, faults=source.faults, digest=parts.digest(), split=parts)


def whole(config: Config) -> Dataset:
    """The source that ``config.data`` names; a process keeps the last one."""
    return _source(json.dumps(config.data, sort_keys=True), config.model["image"])


def cut(config: Config, of: int) -> Split:
    """Who has which of its images, ``of`` clients sharing them; a process keeps the last one."""
    return _split(
        json.dumps(config.data, sort_keys=True), config.model["image"], json.dumps(config.partition, sort_keys=True),
        of, config.seed, config.validation,
    )  # fmt: skip


def cut_by(config: Config) -> dict[str, Any]:
    """The settings that decide who has which image; where the source lies is no matter."""
    data = {k: v for k, v in config.data.items() if k not in ("root", "download")}
    return {"data": data, "partition": config.partition, "seed": config.seed, "validation": config.validation}


def _stored(config: Config, index: int, of: int, key: SharedKey) -> Holdings:
    """The folder ``config.own``. Raises DataError when it is damaged, or not this client's in this run."""
    folder = Path(str(config.own)).expanduser()
    facts, parts = own.read(folder)
    must: dict[str, tuple[Any, Any]] = {"model.image": (config.model["image"], facts.image)}
    if facts.cut is not None:
        asked = {"client": index, "of": of} | cut_by(config)
        must |= {name: (asked[name], ({"client": facts.index, "of": facts.of} | facts.cut).get(name)) for name in asked}
    if facts.encrypted is not None:
        sealed = facts.encrypted
        must |= {"cipher": (config.cipher, sealed.cipher), "model.patch": (config.model["patch"], sealed.block)}
        must |= {"key": (key.fingerprint, sealed.key)}
    for name, (ours, theirs) in must.items():
        if ours != theirs:
            raise DataError(f"{folder} was written for {name} {theirs}, and this run has {ours}; name this client's folder, or write it anew for this run")
    if config.evaluate_on == "validation" and not len(parts["validation"].labels):
        raise DataError(f"evaluate_on=validation needs images to hold out, and {folder} has none; write it anew with validation=0.1")
    shares = {part: Share(examples) for part, examples in parts.items()}
    return Holdings(**shares, classes=facts.classes, faults=facts.faults, digest=facts.split,
                    encrypted=facts.encrypted is not None, name=facts.sha256)  # fmt: skip


@lru_cache(maxsize=1)
def _source(source: str, image: int) -> Dataset:
    return build(json.loads(source), image=image)


@lru_cache(maxsize=1)
def _split(source: str, image: int, partition: str, of: int, seed: int, validation: float) -> Split:
    dataset = _source(source, image)
    return split(build(json.loads(partition)), dataset.train.labels, dataset.test.labels, of, seed, validation)
