"""A run's model again, from its folder: the backbone that its config names, its adapter in plain order, its change of the base.

    <run>/config.yaml  adapter.safetensors  summary.json      must be there
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
from torch import nn
from yaml import YAMLError

from fl.adapter import Parts, apart, digest, group, load, write
from fl.config import Config, build
from fl.config import load as defaults
from fl.models import WeightsError
from fl.models.lora import rebase, take_rank


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


class Restored(NamedTuple):
    """A run's final model on the CPU, in evaluation mode, and what the run left behind. ``base`` is how frozen weights changed."""

    model: nn.Module
    reading: Reading
    config: Config
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    based: bool


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
    config, summary = _config(run / "config.yaml", weights), _json(run / "summary.json")
    try:
        adapter = apart(load(run / "adapter.safetensors"))
        number = len(adapter.own["head.weight"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ExportError(f"{run}/adapter.safetensors must be a run's adapter, and is damaged or none ({_line(error)}); copy it again") from None
    classes = _classes(run / "classes.json", number)
    image, block, fingerprint = config.model["image"], config.model["patch"], str(summary.get("key_fingerprint", ""))
    return Left(config, summary, adapter, Reading(image, block, config.cipher, config.start, fingerprint, classes))


def restore(run: Path, weights: str | None = None) -> Restored:
    """The final model of the run in the folder ``run``; ``weights`` says where its backbone's weights are on this machine.

    Raises ExportError for a folder that is none of a run, a file that is damaged and a backbone that is not the run's,
    WeightsError and ConfigError as the backbone's builder does.
    """
    config, summary, adapter, reading = open_run(run, weights)
    model = backbone(config, len(reading.classes))
    known = summary.get("backbone")
    if known and known != (here := identity(model)):
        raise ExportError(f"the backbone must be the one of the run ({known}), got {here}; say where its weights are")
    build(config.method)(model, config.seed)
    try:
        take_rank(model, adapter.own)
        write(model, adapter.own)
        rebase(model, adapter.base)
    except WeightsError:
        raise
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"the run's adapter does not fit its backbone and method: {_line(error)}; is the folder of one run?") from None
    kept = run.expanduser() / "environment.json"
    return Restored(model.eval(), reading, config, summary, _json(kept) if kept.is_file() else {}, bool(adapter.base))


def backbone(config: Config, classes: int) -> nn.Module:
    """The run's backbone as it was before any training."""
    return build(config.model, classes=classes).eval()


def identity(model: nn.Module) -> str:
    """The digest of a backbone that clients tell at the roll call: of everything but the head."""
    return digest({n: t for n, t in model.state_dict().items() if group(n) != "head"})


def ours(part: Mapping[str, Any], room: str) -> dict[str, Any]:
    """``part`` of a config that came with a folder, if its builder is one of ``room``. Raises ExportError.

    A folder may come from others, and `build` would call whatever it names.
    """
    if not str(part.get("_target_")).startswith(f"{room}."):
        raise ExportError(f"a builder must be one of {room}, got {str(part.get('_target_'))[:60]!r}; export from a folder that you trust")
    return dict(part)


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
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else _line(error)
        raise ExportError(f"{path} must be the config of a run ({reason}); copy it again, or export with the version that ran it") from None
    for part, room in (("model", "fl.models"), ("method", "fl.models"), ("cipher", "fl.ciphers")):
        ours(getattr(config, part), room)
    return config if weights is None else config.model_copy(update={"model": config.model | {"weights": weights}})


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} must be a JSON object, and is damaged ({_line(error)}); copy it again") from None
    if not isinstance(found, dict):
        raise ExportError(f"{path} must be a JSON object, got {type(found).__name__}; copy it again")
    return found


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


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
