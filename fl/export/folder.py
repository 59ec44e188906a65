"""What a run left behind, opened with care: it may be damaged, of an earlier version, or of others.

    <run>/config.yaml  summary.json  adapter.safetensors      must be there
          classes.json                                         a client has it; without it classes are numbers
          environment.json                                     for the card
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from safetensors import SafetensorError
from yaml import YAMLError

from fl.adapter import Parts, apart, load
from fl.config import Config
from fl.config import load as defaults

SAYS = ("seed", "start", "model", "method", "cipher", "data", "strategy", "recipe")  # what a run's config must say itself


class ExportError(ValueError):
    """A run that cannot be restored, or not in the form asked for; one line that says what to do."""


class Reading(NamedTuple):
    """How a released model reads pictures: its side and block in pixels, its cipher, the start that it was trained from.

    ``fingerprint`` is that of the key of its federation, which is no secret; the key itself is nowhere in an export.
    """

    image: int
    block: int
    cipher: dict[str, Any]
    start: str
    fingerprint: str
    classes: tuple[str, ...]

    @property
    def named(self) -> bool:
        """Whether the names of the classes are known, and not their numbers alone."""
        return self.classes != tuple(map(str, range(len(self.classes))))

    @property
    def ciphered(self) -> bool:
        """Whether the federation encrypted its pictures at all."""
        return not self.cipher["_target_"].startswith("fl.ciphers.plain.")

    @property
    def encrypted(self) -> bool:
        """Whether the model in plain order reads encrypted pictures: it learnt the cipher, from a public start."""
        return self.ciphered and self.start == "public"


class Left(NamedTuple):
    """What a run left behind, opened: its config, summary and adapter, and how its model reads pictures."""

    config: Config
    summary: Mapping[str, Any]
    adapter: Parts
    reading: Reading


def open_run(run: Path, weights: str | None = None) -> Left:
    """The files of the run in the folder ``run``; ``weights`` takes the place of its config's. Raises ExportError."""
    run = run.expanduser()
    missing = [name for name in ("config.yaml", "summary.json", "adapter.safetensors") if not (run / name).is_file()]
    if missing:
        hint = "; a blind run's adapter is with its clients: copy it here" if (run / "sealed.safetensors").is_file() else ""
        raise ExportError(f"a run folder must hold config.yaml, summary.json and adapter.safetensors, got {run} without {missing[0]}{hint}")
    config, summary = _config(run / "config.yaml", weights), read_json(run / "summary.json")
    try:
        adapter = apart(load(run / "adapter.safetensors"))
        number = len(adapter.own["head.weight"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ExportError(f"{run}/adapter.safetensors must be a run's adapter, and is damaged or none ({one_line(error)}); copy it again") from None
    classes = _classes(run / "classes.json", number)
    image, block, fingerprint = config.model["image"], config.model["patch"], str(summary.get("key_fingerprint", ""))
    return Left(config, summary, adapter, Reading(image, block, config.cipher, config.start, fingerprint, classes))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ExportError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} must be a JSON object, and is damaged ({one_line(error)}); copy it again") from None
    if not isinstance(found, dict):
        raise ExportError(f"{path} must be a JSON object, got {type(found).__name__}; copy it again")
    return found


def one_line(error: Exception) -> str:
    """An error of others in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _config(path: Path, weights: str | None) -> Config:
    """The run's config; a setting that came after the run has its default, as long as it says all that makes a model."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
        missing = [name for name in SAYS if name not in values]
        if missing:
            raise ValueError(f"it does not say {missing[0]}")
        config = Config.model_validate(defaults("").model_dump() | values)
    except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        place, says = (first["loc"], first["msg"].removeprefix("Value error, ")) if first else ((), one_line(error))
        reason = ": ".join([*([".".join(map(str, place))] if place else []), says])
        raise ExportError(f"{path} must be the config of a run ({reason}); copy it again, or export with the version that ran it") from None
    return config if weights is None else config.model_copy(update={"model": config.model | {"weights": weights}})


def _classes(path: Path, number: int) -> tuple[str, ...]:
    if not path.is_file():
        return tuple(map(str, range(number)))
    try:
        names = json.loads(path.read_text())
    except ValueError:
        names = None
    if not isinstance(names, list) or len(names) != number:
        raise ExportError(f"{path} must list the names of {number} classes; copy it from a client's run folder, or remove it")
    return tuple(map(str, names))
