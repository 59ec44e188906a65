"""The model card of an export, as the Hugging Face Hub reads it, filled in from what the run left behind.

It holds no path of any machine and no key: of the key only the fingerprint, which is one-way.
"""

from __future__ import annotations

import json
from typing import Any, Mapping

from fl.adapter import PATCH_EMBED
from fl.export.peft import base_name
from fl.export.restored import Restored

LIBRARY = {"timm": "timm", "peft": "peft", "onnx": "onnx"}
PLACES = ("_target_", "root", "weights")
USE = {
    "timm": """import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()""",
    "peft": """import timm
from peft import PeftModel
base = BASE
model = PeftModel.from_pretrained(base, "FOLDER").eval()""",
    "onnx": """import onnxruntime
session = onnxruntime.InferenceSession("FOLDER/model.onnx")
logits = session.run(["logits"], {"images": images})[0]    # images: uint8 (n, 3, SIDE, SIDE), not normalised""",
}


def card(restored: Restored, kind: str) -> str:
    """The text of ``README.md``: what was trained on what, how well it does and on what, how it reads pictures, what is hidden."""
    config, summary, reading = restored.config, restored.summary, restored.reading
    rows = {
        "backbone": part(config.model),
        "method": part(config.method),
        "classes": ", ".join(reading.classes) + ("" if reading.named else " (a client's run folder has their names, in classes.json)"),
        "data": f"{part(config.data)}; {summary.get('train_examples') or 'an untold number of'} training images",
        "partition": f"{part(config.partition)} among {summary.get('clients')} clients, {config.fraction:.0%} of them in a round",
        "rounds": f"{summary.get('rounds')} of {config.rounds}; epochs in each: {config.recipe.epochs}, batch {config.recipe.batch}",
        "strategy": part(config.strategy) + (", blind: the server read no update" if config.blind else ""),
        "accuracy": accuracy(restored),
        "bytes": sent(summary, "blind" if config.blind else part(config.codec)),
        "cipher": f"{part(config.cipher)}, {config.start} start, key fingerprint `{reading.fingerprint or 'unknown'}`",
        "seed": str(config.seed),
        "code": f"commit {restored.environment.get('commit') or 'unknown'}, digest {restored.environment.get('code') or 'unknown'}",
        "versions": ", ".join(f"{n} {v}" for n, v in dict(restored.environment.get("versions", {})).items()) or "unknown",
    }
    if config.recipe.keep:
        rows["kept at home"] = f"{', '.join(config.recipe.keep)} trained on each client and stayed there: here they are as they started"
    table = "\n".join(f"| {name} | {' '.join(text.split()).replace('|', chr(92) + '|')} |" for name, text in rows.items())
    return f"""{head(restored, kind)}
# {summary.get('run', config.name)}

An image classifier trained by VeiLoRA: {summary.get('clients')} clients together, each on its own pictures, which stayed there.

| | |
|---|---|
{table}

## How it reads pictures

{reads(restored)}

```python
{use(restored, kind)}
```

## What encryption hides, and what it does not

{hides(restored)}
"""


def reads(restored: Restored) -> str:
    """How a picture has to be prepared for the exported model."""
    way = restored.reading
    encrypted = f"then encrypted with the key {way.fingerprint} in blocks of {way.block}, " if way.encrypted else ""
    pixels = (
        f"A picture is converted to RGB, scaled and centre-cropped to {way.image} x {way.image} (bicubic), as 8-bit values, {encrypted}"
        "then normalised by (x / 255 - 0.5) / 0.5, every channel alike.\n\n"
    )
    if not way.ciphered:
        return pixels + "The model was trained on plain pictures."
    if not way.encrypted:
        return (
            pixels + "The model was trained on encrypted pictures from a keyed start, and is in plain order: it reads plain pictures as "
            "the federation's reads encrypted ones, to rounding, and holds no key. To read pictures encrypted with the key "
            f"{way.fingerprint} in blocks of {way.block}, permute the columns of `patch_embed.proj.weight` by the key, in memory only "
            "(`clients.predict` does so): the permuted weight beside this one gives the key away."
        )
    told = (
        "Its patch embedding beside the public one gives the key away, to whoever holds both: keep this export as you keep the key."
        if told_key(restored)
        else "Its patch embedding is the public one; what the other weights tell of the key was not measured."
    )
    return pixels + f"The model learnt to read encrypted pictures (start=public), and reads no others: inference needs the key. {told}"


def hides(restored: Restored) -> str:
    """The threat model in a few lines."""
    lines = [
        "The clients trust each other with the key; the server had neither key nor pictures. "
        + ("Here is no key file, but weights that give the key away." if told_key(restored) else "Here is no key.")
    ]
    if restored.reading.ciphered:
        lines += [
            "Encryption by shuffled pixels is no cryptographic secrecy: block means stay visible as a thumbnail, one plain and encrypted "
            "pair gives the key, and so do a few encrypted pictures alone. It hides pictures from a glance at a screen or a disk.",
        ]
    lines += [
        "The server added updates that it could not read (blind)."
        if restored.config.blind
        else "The server saw every update in clear, with all that updates say about pictures"
        + (", and from those of the patch embedding the key." if told_key(restored) else "."),
        "No noise was added to the training: the weights may tell who was in the data, and there is no differential-privacy bound.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def told_key(restored: Restored) -> bool:
    """Whether the patch embedding learnt the cipher: beside the public one it then gives the key away."""
    return restored.reading.encrypted and restored.model.get_parameter(PATCH_EMBED).requires_grad


def accuracy(restored: Restored) -> str:
    """The accuracy and on what it was measured."""
    summary = restored.summary
    if summary.get("accuracy") is None:
        return "unknown"
    number = f"{summary['examples']} " if summary.get("examples") else ""
    shards = "encrypted shards" if restored.reading.ciphered else "shards"
    return f"{summary['accuracy']:.2%} on {number}{summary.get('evaluated_on', 'test')} images, summed over the clients' own {shards}"


def sent(summary: Mapping[str, Any], codec: str) -> str:
    """Bytes of the whole run and their ratio to full-model FedAvg."""
    total = sum(sizes.get("total", 0) for sizes in dict(summary.get("bytes", {})).values())
    ratio = summary.get("ratio_to_full_fedavg")
    return f"{total:,} in all, serialised, {codec}" + (f"; a round costs {ratio:.2%} of full-model FedAvg" if ratio else "")


def part(values: Mapping[str, Any]) -> str:
    """A part of the config in words, without this machine's places."""
    named = [f"{n}={v}" for n, v in values.items() if n not in PLACES]
    return values["_target_"].rpartition(".")[2] + (f" ({', '.join(named)})" if named else "")


def head(restored: Restored, kind: str) -> str:
    """The front matter."""
    licence = dict(getattr(restored.model, "pretrained_cfg", {})).get("license") or "other"
    base = base_name(restored)
    lines = ["---", f"license: {json.dumps(licence)}", f"library_name: {LIBRARY[kind]}", "pipeline_tag: image-classification"]
    lines += [f"base_model: {base}"] if base.startswith("timm/") else []
    tags = ("image-classification", LIBRARY[kind], "federated-learning", "lora", "encrypted-images", "veilora")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def use(restored: Restored, kind: str) -> str:
    """The lines that load the export."""
    config, name = restored.config.model, base_name(restored)
    sizes = "".join(f", {n}={v}" for n, v in dict(getattr(restored.model, "asked", {})).items())
    overlay = "" if config.get("weights") == "hub" else ', pretrained_cfg_overlay={"file": "WEIGHTS", "custom_load": False}'
    base = f'timm.create_model("{name.removeprefix("timm/")}", pretrained=True, num_classes={len(restored.reading.classes)}{sizes}{overlay})'
    if "name" not in config or config.get("weights") == "none":
        base = f"...    # {name}: the run's own backbone, with its own weights and a head of {len(restored.reading.classes)} classes"
    return USE[kind].replace("BASE", base).replace("SIDE", str(restored.reading.image))
