"""A run's model: for other programs, and to classify pictures with."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from simulations.veilora.answers import As, Format, answer

app = typer.Typer()


class Kind(StrEnum):
    """What an export is for."""

    timm = "timm"
    peft = "peft"
    onnx = "onnx"


@app.command()
def export(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="a run's folder")],
    out: Annotated[Path, typer.Argument(help="the new folder")],
    kind: Annotated[Kind, typer.Option(help="a merged timm model, a Hugging Face peft adapter, or ONNX")] = Kind.timm,
    verify: Annotated[bool, typer.Option("--verify", help="read it back and compare logits")] = False,
    weights: Annotated[str | None, typer.Option(help="the backbone's weights, where they are not where the run had them")] = None,
    format: As = Format.text,
) -> None:
    """Write a run's model for other programs, with a card."""
    from fl.export import export

    found = export(run, out, kind.value, verify, weights)
    checked = f"; read back, its logits differ by {found['difference']:.1e} at most, of {found['largest']:.1f}" if verify else ""
    answer(format, found, f"{found['folder']}: {kind.value}, reads {found['reads']} pictures{checked}")


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="a run, or a timm export")],
    images: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="pictures, as * or <class>/*")],
    key: Annotated[Path | None, typer.Option(help="the image key: pictures are encrypted in memory before they are read")] = None,
    encrypted: Annotated[bool, typer.Option("--encrypted", help="the pictures are encrypted already, as veilora encrypt writes them")] = False,
    weights: Annotated[str | None, typer.Option(help="the backbone's weights")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    format: As = Format.text,
) -> None:
    """Classify a folder of pictures with a run's model."""
    from clients.predict import predict

    found = predict(folder, images, key, encrypted, weights, device)
    rows = [f"{row['file']}\t{row['class']}\t{row['probability']:.4f}" for row in found["rows"]]
    rows += [f"accuracy {found['accuracy']:.2%} of {found['images']}"] if "accuracy" in found else []
    rows += [f"no accuracy: {', '.join(found['strangers'])} are no classes of this model"] if found.get("strangers") else []
    answer(format, found, "\n".join(rows))


@app.command()
def encrypt(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="a run, or an export: for its model")],
    images: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="plain pictures")],
    out: Annotated[Path, typer.Argument(help="the new folder")],
    key: Annotated[Path, typer.Option(help="the image key")],
    format: As = Format.text,
) -> None:
    """Encrypt a folder of pictures, as PNG, for a run's model to read."""
    from clients.predict import encrypt_folder

    found = encrypt_folder(folder, images, out, key)
    skipped = f", {found['skipped']} files left out" if found["skipped"] else ""
    answer(format, found, f"{found['folder']}: {found['images']} pictures encrypted with key {found['key_fingerprint']}{skipped}; predict reads them with --encrypted")
