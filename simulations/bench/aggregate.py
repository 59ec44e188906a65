"""The server's sum: 100 updates of ViT-B/16's lora_patch, 745,738 float32 in 52 tensors, on one core.

Extra memory is what aggregation adds at its peak to a fresh process that holds all the updates already, as Flower's grid
does when the last one has come in.
"""

from __future__ import annotations

from typing import Callable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fl.adapter import Adapter, average, flat
from fl.wire.flat import pack, unpack
from fl.wire.float32 import float32
from simulations.bench.machine import machine
from simulations.bench.memory import apart, growth
from simulations.bench.pairs import faster, race
from simulations.bench.report import Check, Options, Row, Section

FLOWER, FLOWER_FLAT = "Flower, 52 tensors", "Flower, 1 flat tensor"
OURS, READ = "ours, each added as it comes", "read once"


def shapes() -> dict[str, tuple[int, ...]]:
    """The 52 tensors of ViT-B/16, ten classes, rank 4: 745,738 values."""
    found: dict[str, tuple[int, ...]] = {}
    for block in range(12):
        for part in ("q", "v"):
            name = f"blocks.{block}.attn.qkv.{part}"
            found |= {f"{name}.lora_a.weight": (4, 768), f"{name}.lora_b.weight": (768, 4)}
    return found | {
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "patch_embed.proj.bias": (768,),
        "head.weight": (10, 768),
        "head.bias": (10,),
    }


def update() -> Adapter:
    """One random update."""
    return {name: torch.randn(shape) for name, shape in shapes().items()}


def records(count: int, flat: bool) -> list[RecordDict]:
    """Updates as Flower's strategies receive them."""
    def arrays(adapter: Adapter) -> ArrayRecord:
        if flat:
            return ArrayRecord({"flat": Array(torch.cat([t.reshape(-1) for t in adapter.values()]).numpy())})
        return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in adapter.items()})

    return [RecordDict({"arrays": arrays(update()), "metrics": MetricRecord({"num-examples": 1})}) for _ in range(count)]


def candidate(name: str, count: int) -> Callable[[], object]:
    """One way to aggregate ``count`` updates that have come in, ready to be called."""
    if name in (FLOWER, FLOWER_FLAT):
        received = records(count, flat=name == FLOWER_FLAT)
        return lambda: aggregate_arrayrecords(received, "num-examples")
    packed = [pack(flat(update()), float32()) for _ in range(count)]
    if name == READ:
        return lambda: [torch.from_numpy(p.payload.view(np.float32)).sum() for p in packed]
    return lambda: average((unpack(p, float32()), 1.0) for p in packed)


def run(options: Options) -> list[Section]:
    """The table; --quick takes 20 updates."""
    count = 20 if options.quick else 100
    names = (FLOWER, FLOWER_FLAT, OURS, READ)
    seconds = race({name: candidate(name, count) for name in names}, options.pairs)
    size = 4 * count * sum(int(np.prod(shape)) for shape in shapes().values())
    limit = f"{1e3 * size / machine().read:.1f} ms to read once"
    rows = []
    for name in names:
        checks = () if name != OURS else (
            Check(faster(seconds, name, FLOWER).median, ">=", 15, "x Flower's", faster(seconds, READ, FLOWER).median),
            Check(1 / faster(seconds, name, READ).median, "<=", 2, "x read once"),
        )
        memory = "" if name == READ else f"; +{apart(extra_memory, name, count) / 1e6:.0f} MB at the peak"
        rows.append(Row(name, 1e3 * float(np.median(seconds[name])), "ms", faster(seconds, name, FLOWER), limit + memory, checks))
    return [Section("aggregate", f"{count} updates of 745,738 float32, {size / 1e6:.0f} MB, one core", FLOWER, rows)]


def extra_memory(name: str, count: int) -> int:
    """Bytes that aggregation adds at its peak to a process that holds the updates."""
    torch.set_num_threads(1)
    candidate(name, 2)()  # so that what is allocated once is there
    return growth(candidate(name, count))[1]
