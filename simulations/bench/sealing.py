"""Blind aggregation of ViT-B/16's lora_patch, 745,738 values in 32 bits, on one core: to seal, to add, to open, beside training.

Training is one client's round of 100 pictures at 224 px, timed on four of them. Adding is the server's, of messages at hand.
"""

from __future__ import annotations

import numpy as np

from fl.seal_key import SealKey
from fl.wire import sealed, transcript
from fl.wire.masks import Terms, open_total, seal
from fl.wire.sealed import Sealed, Total
from simulations.bench.machine import machine
from simulations.bench.pairs import faster, race
from simulations.bench.report import Check, Options, Row, Section
from simulations.bench.step import BASE, ours

COUNT, PICTURES, BATCH = 745_738, 100, 4
TRAIN, SEAL = f"train, {PICTURES} pictures", "seal"
KEY, BOUND = SealKey(bytes(range(32))), transcript.bound(bytes(transcript.BYTES), "train")


def run(options: Options) -> list[Section]:
    """The table; --quick leaves a thousand clients out."""
    update = np.random.default_rng(0).normal(0, 1e-3, COUNT).astype(np.float32)
    work = {TRAIN: ours(BASE, BATCH, "lean", "float32", 1), SEAL: lambda: message(update, 0, 10)}
    for clients in (10, 100) if options.quick else (10, 100, 1000):
        total = sealed.add((message(update, k, clients) for k in range(clients)), COUNT, 32)
        work[f"open, {clients} clients"] = lambda total=total, clients=clients: opened(total, clients)
        if clients <= 100:
            messages = [message(update, k, clients) for k in range(clients)]
            work[f"add, {clients} clients"] = lambda messages=messages: sealed.add(messages, COUNT, 32)
    seconds = race(work, options.pairs)
    seconds[TRAIN] = [s * PICTURES / BATCH for s in seconds[TRAIN]]
    rows = []
    for name, found in seconds.items():
        ratio = faster(seconds, name, TRAIN)
        clients = int(name.split()[1]) if name.startswith(("open", "add")) else 1
        limit = f"{1e3 * 4 * COUNT * clients / machine().read:.1f} ms to read its words once" if name != TRAIN else ""
        checks = () if name != "open, 10 clients" else (
            Check(float(np.median([100 * (s + o) / t for s, o, t in zip(seconds[SEAL], found, seconds[TRAIN])])), "<=", 1, " % of training, with sealing"),
        )
        rows.append(Row(name, 1e3 * float(np.median(found)), "ms", ratio, limit, checks))
    return [Section("sealing", f"{COUNT:,} values in words of 32 bits, one core", TRAIN, rows)]


def message(update: np.ndarray, client: int, clients: int) -> Sealed:
    """What one of ``clients`` sends."""
    return seal(KEY, BOUND, 1, client, update, 100, 1.0, terms(clients))


def opened(total: Total, clients: int) -> bytes:
    """A client's work on a sum: open it, and follow the transcript."""
    open_total(KEY, BOUND, 1, total, COUNT, terms(clients))
    return transcript.follow(bytes(transcript.BYTES), 1, total)


def terms(clients: int) -> Terms:
    """The terms of so many."""
    return Terms(32, clients, 100, 1.0)
