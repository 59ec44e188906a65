"""A model to predict with, and how it reads pictures: from a run's folder, or from an export of kind=timm."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from fl.builders import builders
from fl.export import merged
from fl.export.folder import ExportError, Reading, open_run
from fl.export.restored import restore

READING = "veilora.json"  # in every export: what `Reading` holds, and the kind


def release(folder: Path, weights: str | None = None) -> tuple[nn.Module, Reading]:
    """The model, in plain order, on the CPU, and its reading. Raises as `reading` does, and for a run's folder as `restore` does."""
    if is_run(folder):
        restored = restore(folder, weights)
        return restored.model, restored.reading
    found = reading(folder)
    return merged.read(folder.expanduser()), found


def reading(folder: Path) -> Reading:
    """How the model in ``folder`` reads pictures, without the model. Raises ExportError."""
    if is_run(folder):
        return open_run(folder).reading
    path = folder.expanduser() / READING
    if not path.is_file():
        raise ExportError(f"a run's folder (config.yaml) or an export of kind=timm ({READING}) is needed, got {folder}")
    try:
        values = json.loads(path.read_text())
        kind = values.pop("kind")
        found = Reading(**values)
        found = found._replace(classes=tuple(found.classes), cipher=dict(found.cipher))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{path} is damaged ({type(error).__name__}); export the run again") from None
    if kind != "timm":
        raise ExportError(f"pictures are predicted from a run's folder or an export of kind=timm, got kind={kind}; that one is for its own library")
    if found.cipher.get("_target_") not in builders("cipher"):
        raise ExportError(f"{path} must name a cipher of conf/cipher, got {str(found.cipher.get('_target_'))[:60]!r}; take a folder that you trust")
    return found


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a run's."""
    return (folder.expanduser() / "config.yaml").is_file()
