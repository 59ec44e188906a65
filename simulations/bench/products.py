"""The server's SVD of a mean of products: 24 modules of 768 x 768, rank 4, ten clients, on one core.

The dense one, as FlexLoRA is often written, is timed on one module and counted as often as there are modules.
"""

from __future__ import annotations

import numpy as np
import torch

from simulations.bench.pairs import faster, race
from simulations.bench.report import Check, Options, Row, Section
from strategies.factors import stack, svd

DENSE, OURS = "dense, torch.linalg.svd", "ours, on stacked factors"
D, RANK, CLIENTS, MODULES = 768, 4, 10, 24
A, B = "qkv.q.lora_a.weight", "qkv.q.lora_b.weight"


def run(options: Options) -> list[Section]:
    """The table; --quick takes modules of 192 x 192."""
    torch.set_num_threads(1)
    d = 192 if options.quick else D
    clients = [{A: torch.randn(RANK, d), B: torch.randn(d, RANK)} for _ in range(CLIENTS)]
    weights = [1.0] * CLIENTS
    seconds = race(
        {
            DENSE: lambda: torch.linalg.svd(sum(c[B].double() @ c[A].double() for c in clients) / CLIENTS, full_matrices=False),
            OURS: lambda: svd(*stack(clients, weights, A, B), rank=RANK),
        },
        options.pairs,
    )
    ours = faster(seconds, OURS, DENSE)
    limit = f"{CLIENTS * RANK} columns instead of {d}"
    rows = [
        Row(DENSE, 1e3 * MODULES * float(np.median(seconds[DENSE])), "ms", faster(seconds, DENSE, DENSE)),
        Row(OURS, 1e3 * MODULES * float(np.median(seconds[OURS])), "ms", ours, limit, (Check(ours.median, ">=", 100, "x the dense"),)),
    ]
    return [Section("products", f"SVD of {MODULES} mean products of {d} x {d}, rank {RANK}, {CLIENTS} clients, one core", DENSE, rows)]
