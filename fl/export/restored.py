"""A run's model again: the backbone that its config names, its adapter in plain order, its change of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, NamedTuple

from torch import nn

from fl.adapter import digest, group, write
from fl.config import Config, build
from fl.export.folder import ExportError, Reading, one_line, open_run, read_json
from fl.models import WeightsError
from fl.models.lora import rebase, take_rank


class Restored(NamedTuple):
    """A run's final model on the CPU, in evaluation mode, and what the run left behind. ``based``: frozen weights changed, too."""

    model: nn.Module
    reading: Reading
    config: Config
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    based: bool


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
        raise ExportError(f"the run's adapter does not fit its backbone and method: {one_line(error)}; is the folder of one run?") from None
    kept = run.expanduser() / "environment.json"
    return Restored(model.eval(), reading, config, summary, read_json(kept) if kept.is_file() else {}, bool(adapter.base))


def backbone(config: Config, classes: int) -> nn.Module:
    """The run's backbone as it was before any training."""
    return build(config.model, classes=classes).eval()


def identity(model: nn.Module) -> str:
    """The digest of a backbone that clients tell at the roll call: of everything but the head."""
    return digest({n: t for n, t in model.state_dict().items() if group(n) != "head"})
