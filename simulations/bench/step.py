"""The client's training step, on one core: ours beside full fine-tuning and beside HF peft in its four usual forms.

peft adapts the whole fused qkv, so that its LoRA also changes k; patch embedding and head train as ours do. The targets are
held to the fastest of ours, which is what ``precision=auto`` chooses.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fl.datasets import Examples
from fl.lean import lean
from fl.lean.choose import choose
from fl.lean.compiled import compiled
from fl.lean.heap import keep_freed_memory
from fl.learn import fit, normalise, plain
from fl.models.lora_patch import lora_patch
from fl.models.vit import vit
from fl.randomness import generator
from fl.recipe import Recipe
from simulations.bench.flower_vit.task import SMALL, get_model
from simulations.bench.machine import flops, machine
from simulations.bench.pairs import Work, faster, race, rate
from simulations.bench.report import Check, Options, Row, Section

TINY = {"name": "vit_tiny_patch16_224", "image": 224, "patch": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
BASE = {"name": "vit_base_patch16_224", "image": 224, "patch": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
OURS = (("plain", "float32"), ("lean", "float32"), ("lean", "bfloat16"))
RATES = {"lora_a": 1e-3, "lora_b": 1e-3, "patch_embed": 1e-3, "head": 1e-3}


class Case(NamedTuple):
    """One model: the batch, optimiser steps timed together, and the target against peft in float32."""

    title: str
    shape: dict
    batch: int
    steps: int
    target: float


CASES = (
    Case("ViT 32/4, width 192, 6 blocks", SMALL, 64, 3, 2.2),
    Case("ViT-Tiny/16 at 224", TINY, 8, 2, 2.2),
    Case("ViT-B/16 at 224", BASE, 4, 1, 2.0),
)


def run(options: Options) -> Iterator[Section]:
    """One table for each model; --quick leaves ViT-B out."""
    return (compare(case, options.pairs) for case in CASES[: 2 if options.quick else 3])


def compare(case: Case, pairs: int) -> Section:
    """Images a second and core of every candidate on one model."""
    first = "full, float32"
    work = {
        first: full(case.shape, case.batch, case.steps),
        "peft, float32": with_peft(case.shape, case.batch, case.steps),
        "peft, bfloat16 autocast": with_peft(case.shape, case.batch, case.steps, autocast=True),
        "peft, bfloat16, plain attention": with_peft(case.shape, case.batch, case.steps, autocast=True, fused=False),
    }
    peers = list(work)
    work |= {f"ours {step}, {precision}": ours(case.shape, case.batch, step, precision, case.steps) for step, precision in OURS}
    seconds = race(work, pairs)
    images = case.batch * case.steps
    best = max(peers, key=lambda name: rate(seconds, name, images))
    need, peak = flops(*(case.shape[k] for k in ("embed_dim", "depth", "image", "patch"))), machine()
    ceiling = max(peak.float32, peak.bfloat16) / need.pooled
    targets = (("peft, float32", case.target), (best, 1.1), (first, 2.5))
    lead = min((name for name in work if name not in peers), key=lambda name: statistics.median(seconds[name]))
    rows = []
    for name in work:
        speed = rate(seconds, name, images)
        bound = (peak.bfloat16 if "bfloat16" in name else peak.float32) / (need.full if name == first else need.pooled)
        checks = () if name != lead else tuple(
            Check(faster(seconds, name, peer).median, ">=", target, f"x {peer}", ceiling / rate(seconds, peer, images))
            for peer, target in targets
        )
        limit = f"{bound:.1f} img/s; {speed / bound:.0%} reached"
        rows.append(Row(name, speed, "img/s", faster(seconds, name, "peft, float32"), limit, checks))
    return Section("step", f"{case.title}, batch {case.batch}, one core ({peak})", "peft, float32", rows)


def pictures(shape: dict, count: int) -> Examples:
    """Random pictures and labels in memory, uint8 (count, 3, image, image)."""
    stream = generator(0, "bench", "pictures")
    images = torch.randint(0, 256, (count, 3, shape["image"], shape["image"]), generator=stream, dtype=torch.uint8)
    return Examples(images, torch.randint(0, 10, (count,), generator=stream))


CPU = torch.device("cpu")


def ours(shape: dict, batch: int, step: str = "plain", precision: str = "float32", steps: int = 3, device: torch.device = CPU) -> Work:
    """Our training loop with method lora_patch; without clipping, since the peers do not clip."""
    keep_freed_memory()  # as a client does; the peers have the good of it, too
    model = vit(**shape, classes=10, weights="none")
    lora_patch()(model, 0)
    model.to(device)
    attention = choose(precision, "auto", model, device)[1]
    forward = {"plain": plain, "lean": lean, "compiled": compiled}[step](model, precision, attention)
    examples, recipe = pictures(shape, batch * steps), Recipe(lr=RATES, batch=batch, clip=0.0)
    return lambda: fit(model, examples, recipe, generator(0, "bench", "order"), forward=forward)


def full(shape: dict, batch: int, steps: int) -> Work:
    """Full fine-tuning of timm's model."""
    return loop(vit(**shape, classes=10, weights="none"), pictures(shape, batch * steps), batch, nullcontext)


def with_peft(shape: dict, batch: int, steps: int, autocast: bool = False, fused: bool = True) -> Work:
    """peft on timm's model; without ``fused``, attention as timm computes it after ``set_fused_attn(False)``."""
    model = get_model(**shape)
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else nullcontext
    return loop(model, pictures(shape, batch * steps), batch, context)


def loop(model: nn.Module, examples: Examples, batch: int, context: Callable) -> Work:
    """A training loop as everyone writes it, with torch's fused AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, fused=True)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with context():
            logits = model(normalise(images))
        cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    def work() -> None:
        model.train()
        for images, labels in zip(examples.images.split(batch), examples.labels.split(batch)):
            step(images, labels)

    return work
