"""A run's model in other people's formats, one file each, with a card; what was written is read back and compared.

    folder.py     what a run left behind, opened
    restored.py   run folder -> model, adapter in plain order
    released.py   run folder or export -> a model to predict with
    merged.py     kind=timm: LoRA folded into a plain timm model
    peft.py       kind=peft: one exact adapter on the fused qkv, for Hugging Face's peft
    onnx.py       kind=onnx: the merged model, bytes of pictures in
    card.py       README.md beside each

An export is in plain order. From a keyed start it reads plain pictures and holds no key. From a public start it has learnt
the cipher: it reads encrypted pictures, and gives the key away to who compares it with the public weights; its card says so.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Literal

from fl.datasets.demo import KINDS, draw
from fl.datasets.images import resize
from fl.export import merged, onnx, peft
from fl.export.card import card
from fl.export.folder import ExportError
from fl.export.released import READING
from fl.export.restored import Restored, backbone, restore
from fl.models import Forward
from fl.randomness import generator

Kind = Literal["peft", "timm", "onnx"]
WRITE = {"peft": peft.write, "timm": merged.write, "onnx": onnx.write}
BOUND = 1e-3  # of the largest logit: more than rounding makes of float32


def export(run: Path, out: Path, kind: Kind, verify: bool = False, weights: str | None = None) -> dict:
    """Write the model of the ``run``'s folder into the new folder ``out``, whole or not at all.

    ``verify`` reads it back first and compares logits. Returns a JSON-able record: kind, folder, files with their bytes, which
    pictures it reads (plain or encrypted), and where verified ``difference``, the largest of any logit on drawn pictures,
    beside ``largest``, the largest logit. Raises ExportError, WeightsError and ConfigError, each with one line.
    """
    out = out.expanduser().absolute()
    if kind not in WRITE:
        raise ExportError(f"kind must be one of {', '.join(WRITE)}, got {kind!r}")
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ExportError(f"an export needs a new folder, got {out}, where something stands; choose another")
    restored = restore(run, weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        fresh = Path(scratch) / out.name
        WRITE[kind](restored, fresh)
        (fresh / "README.md").write_text(card(restored, kind))
        (fresh / READING).write_text(json.dumps(restored.reading._asdict() | {"kind": kind}, indent=1) + "\n")
        found = compare(restored, fresh, kind) if verify else {}
        os.replace(fresh, out)
    return {
        "kind": kind,
        "folder": str(out),
        "files": {p.name: p.stat().st_size for p in sorted(out.iterdir())},
        "reads": "encrypted" if restored.reading.encrypted else "plain",
        "key_fingerprint": restored.reading.fingerprint,
        **found,
    }


def compare(restored: Restored, out: Path, kind: Kind) -> dict[str, float]:
    """The largest difference between the export's logits and the run's, on drawn pictures. Raises ExportError above `BOUND`."""
    images = resize(draw(KINDS, 40, generator(0, "export", "verify")).images, restored.reading.image)
    expected = merged.forward(restored.model)(images)
    difference = float((read_back(restored, out, kind)(images) - expected).abs().max())
    largest = float(expected.abs().max())
    if not difference <= BOUND * (1 + largest):
        raise ExportError(f"the export must compute what the run's model does, and its logits differ by {difference:.2g}; nothing was written")
    return {"difference": difference, "largest": largest}


def read_back(restored: Restored, out: Path, kind: Kind) -> Forward:
    """The export as a function, from its files."""
    match kind:
        case "timm":
            return merged.forward(merged.read(out))
        case "peft":
            return merged.forward(peft.read(out, backbone(restored.config, len(restored.reading.classes))))
        case "onnx":
            return onnx.read(out)
