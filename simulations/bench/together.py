"""Several clients on one frozen base: trained at once, beside the same clients one after another.

On a CPU in CPU seconds of one core; where there is a GPU on that, by the wall: each turn ends with the adapters back on the CPU.
With a small batch a GPU waits for its next launch, and there several clients at once pay; so the target is a GPU's.
"""

from __future__ import annotations

import time
from typing import Iterator, NamedTuple

import torch

from fl import adapter as adapters
from fl.course import Course
from fl.lean import lean
from fl.lean.choose import choose
from fl.lean.heap import keep_freed_memory
from fl.lean.stacked import stack
from fl.learn import fit, fit_together
from fl.models.demo import NAME, SHAPE
from fl.models.lora_patch import lora_patch
from fl.models.vit import vit
from fl.provenance import processor
from fl.randomness import generator
from fl.recipe import Recipe
from simulations.bench.flower_vit.task import SMALL
from simulations.bench.pairs import Work, faster, race, rate
from simulations.bench.report import Check, Options, Row, Section
from simulations.bench.step import RATES, TINY, pictures

STEPS = 3


class Case(NamedTuple):
    """So many clients with batches of so many pictures."""

    clients: int
    batch: int


CASES = (Case(8, 4), Case(8, 8), Case(4, 16))


def run(options: Options) -> Iterator[Section]:
    """A table for the demo's model and one for the small ViT, and on a GPU one for ViT-Tiny."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    demo = {"name": NAME, "image": 32, "patch": 8, **SHAPE}
    models = {"the demo's ViT 32/8, width 64, 3 blocks": demo, "ViT 32/4, width 192, 6 blocks": SMALL}
    models |= {"ViT-Tiny/16 at 224": TINY} if gpu else {}
    return (compare(title, shape, device, options.pairs) for title, shape in models.items())


def compare(title: str, shape: dict, device: torch.device, pairs: int) -> Section:
    """Images a second of every case, in both precisions, at once and one by one."""
    gpu, rows = device.type == "cuda", []
    for clients, batch in CASES:
        for precision in ("float32", "bfloat16"):
            alone, at_once = works(shape, clients, batch, precision, device)
            seconds = race({"alone": alone, "at once": at_once}, pairs, time.perf_counter if gpu else time.process_time)
            gain, images = faster(seconds, "at once", "alone"), clients * batch * STEPS
            check = Check(gain.median if gpu else None, ">=", 3, "x one by one on a GPU")
            name = f"{clients} clients x batch {batch}, {precision}"
            rows.append(Row(name, rate(seconds, "at once", images), "img/s", gain, checks=(check,)))
    return Section("together", f"{title}, {processor(device)}", "one by one", rows)


def works(shape: dict, clients: int, batch: int, precision: str, device: torch.device, steps: int = STEPS) -> tuple[Work, Work]:
    """The same clients one after another, the small tensors swapped in between, and at once."""
    keep_freed_memory()
    model = vit(**shape, classes=10, weights="none")
    lora_patch()(model, 0)
    model.to(device)
    attention = choose(precision, "auto", model, device)[1]
    start, several = adapters.read(model), stack(model, clients)
    one, many = lean(model, precision, attention), lean(several, precision, attention)
    examples, recipe = pictures(shape, batch * steps), Recipe(lr=RATES, batch=batch)

    def alone() -> None:
        for i in range(clients):
            adapters.write(model, start)
            fit(model, examples, recipe, generator(0, "bench", i), forward=one)
            adapters.read(model)

    def at_once() -> None:
        adapters.write_rows(several, [start] * clients)
        fit_together(several, [Course(examples, generator(0, "bench", i)) for i in range(clients)], recipe, many)
        adapters.read_rows(several)

    return alone, at_once
