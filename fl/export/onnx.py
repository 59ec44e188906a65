"""The merged model as one ONNX file: ``images`` uint8 (batch, 3, side, side) -> ``logits`` float32 (batch, classes).

Normalisation is inside, so that whoever runs it hands over the bytes of pictures; how they are read stands in the file's
metadata. Needs the extra ``onnx``.
"""

from __future__ import annotations

import json
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from fl.export.merged import merge
from fl.export.folder import ExportError
from fl.export.restored import Restored
from fl.learn import normalise
from fl.models import Forward

FILE = "model.onnx"


class Reader(nn.Module):
    """A model that takes pictures as bytes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(normalise(images))


def write(restored: Restored, folder: Path) -> None:
    """``model.onnx``, with any number of pictures in a batch. Raises ExportError where the extra is not installed."""
    onnx, _ = needed("onnx"), needed("onnxscript")
    folder.mkdir(parents=True, exist_ok=True)
    side = restored.reading.image
    sample = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of its own parts
        torch.onnx.export(
            Reader(merge(restored.model)).eval(), (sample,), str(folder / FILE), input_names=["images"], output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, external_data=False, dynamo=True, verbose=False,
        )
    graph = onnx.load(folder / FILE)
    onnx.helper.set_model_props(graph, {n: json.dumps(v) for n, v in restored.reading._asdict().items()})
    onnx.save(graph, folder / FILE)


def read(folder: Path) -> Forward:
    """The file as onnxruntime computes it on the CPU."""
    session = needed("onnxruntime").InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def needed(name: str) -> ModuleType:
    """A module of the extra ``onnx``. Raises ExportError with the way to get it."""
    try:
        return import_module(name)
    except ImportError:
        raise ExportError(f"kind=onnx needs {name}, which is not installed; run: pip install 'veilora[onnx]'") from None
