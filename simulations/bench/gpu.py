"""The client's training step on a GPU: ours, as it is and compiled, beside HF peft under autocast and torch.compile.

By the wall, since a GPU works while its host waits; each turn ends with a value read back. The machine's limit is the rate of a
large product in bfloat16, over the operations that a step needs (`simulations.bench.machine.flops`).
"""

from __future__ import annotations

import time
from typing import Callable, Iterator, NamedTuple

import torch
from torch import nn

from fl.datasets import Examples
from simulations.bench.flower_vit.task import SMALL, get_model
from simulations.bench.machine import flops
from simulations.bench.pairs import Work, faster, race, rate
from simulations.bench.report import Check, Options, Row, Section
from simulations.bench.step import BASE, TINY, loop, ours, pictures

PEER = "peft, bfloat16 autocast, compiled"


class Case(NamedTuple):
    """One model: the batch, and the targets, the share of the limit and the gain over the peer, where it has any."""

    title: str
    shape: dict
    batch: int
    share: float | None = None
    gain: float | None = None


CASES = (
    Case("ViT-B/16 at 224", BASE, 64, share=45, gain=1.5),
    Case("ViT-Tiny/16 at 224", TINY, 64),
    Case("ViT 32/4, width 192, 6 blocks", SMALL, 64),
)


def run(options: Options) -> Iterator[Section]:
    """One table for each model; --quick takes ViT-B alone. Without a GPU there is none."""
    if not torch.cuda.is_available():
        print("gpu: SKIPPED, since torch can see no GPU; its rows stay open", flush=True)
        return iter(())
    device = torch.device("cuda", torch.cuda.current_device())
    return (compare(case, device, options.pairs) for case in CASES[: 1 if options.quick else 3])


def compare(case: Case, device: torch.device, pairs: int, steps: int = 10, compiler: Callable = torch.compile) -> Section:
    """Images a second of every candidate on one model."""
    work = {PEER: peer(case, device, steps, compiler)}
    ways = ("lean", "compiled") if device.type == "cuda" else ("lean",)
    work |= {f"ours {way}, bfloat16": ours(case.shape, case.batch, way, "bfloat16", steps, device) for way in ways}
    seconds = race(work, pairs, time.perf_counter, least=0.0)
    images, peak = case.batch * steps, products(device)
    bound = peak / flops(*(case.shape[k] for k in ("embed_dim", "depth", "image", "patch"))).pooled
    lead = max((name for name in work if name != PEER), key=lambda name: rate(seconds, name, images))
    rows = []
    for name in work:
        speed, gain = rate(seconds, name, images), faster(seconds, name, PEER)
        checks = [Check(100 * speed / bound, ">=", case.share, " % of the limit")] if case.share and name == lead else []
        checks += [Check(gain.median, ">=", case.gain, "x peft, compiled")] if case.gain and name == lead else []
        rows.append(Row(name, speed, "img/s", gain, f"{bound:,.0f} img/s; {speed / bound:.0%} reached", tuple(checks)))
    return Section("gpu", f"{case.title}, batch {case.batch}, {peak / 1e12:.3g} TFLOP/s in a product of bfloat16", PEER, rows)


def peer(case: Case, device: torch.device, steps: int, compiler: Callable) -> Work:
    """peft as everyone writes it for a GPU: all images there, autocast, one compiled module."""
    model: nn.Module = compiler(get_model(**case.shape).to(device))
    examples = Examples(*(t.to(device) for t in pictures(case.shape, case.batch * steps)))
    turn = loop(model, examples, case.batch, lambda: torch.autocast(device.type, torch.bfloat16))

    def work() -> None:
        turn()
        next(model.parameters()).flatten()[0].item()  # waits for all that came before

    return work


def products(device: torch.device, side: int = 8192, repeats: int = 10) -> float:
    """FLOP/s of a product of side^3 in bfloat16, at the best of the ``repeats``; a CPU's is smaller."""
    side = side if device.type == "cuda" else 512
    a, b = (torch.rand(side, side, device=device).bfloat16() for _ in range(2))

    def work() -> None:
        (a @ b)[0, 0].item()

    return 2 * side**3 / min(race({"product": work}, repeats, time.perf_counter, least=0.0)["product"])
