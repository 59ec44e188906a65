"""What one broken client does to a run: Flower's stock FedAvg beside ours, on the same faults.

    python -m simulations.audit.faults [--out simulations/results/faults]

Six honest clients and one that breaks, three rounds, in process. An honest client moves every value of a small adapter by
0.01 times its number. ``off`` is the largest distance of the final adapter from the one that the six alone come to. Each
fault is said once, as what it makes of a client's arrays, its weight and its replies; each side writes it in its own messages.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl.adapter import digest
from fl.adapter import load as load_adapter
from fl.config import load
from fl.journal import Journal
from fl.provenance import code_digest, environment
from fl.wire.coding import WHOLE
from fl.wire.flat import Packed, pack, unpack
from fl.wire.records import facts_of, packed_of, to_content
from simulations.audit.broken import BAD, EXAMPLES, FAULTS, HONEST, ROUNDS, START, Arrays, Fault, Faulty, difference
from strategies.flower import federate

def ours(fault: Fault | None, clients: int) -> tuple[str, Arrays | None]:
    """What our server makes of it: how the run ended, and its adapter."""
    app, start = ClientApp(), {n: torch.from_numpy(a) for n, a in START.items()}

    @app.query()
    def query(message: Message, context: Context) -> Message:
        if facts_of(message).get("start"):
            return Message(to_content({}, pack(start, WHOLE)), reply_to=message)
        same = dict.fromkeys(("config", "key", "backbone", "classes", "split"), "same") | {"seal": "", "code": code_digest(), "start": digest(start)}
        roll = {"client": context.node_config["partition-id"], "of": clients, "digests": same, "train": EXAMPLES, "evaluate": 10}
        return Message(to_content(roll | {"trained": 38, "full_bytes": 10**6, "faults": {}, "machine": "none", "rank": 4}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, told = context.node_config["partition-id"], facts_of(message)
        if fault and client == BAD and fault.replies == "error":
            raise RuntimeError("/home/someone/pictures/7.png cannot be read")
        arrays, examples = difference(client, fault)
        rows = [[n, list(a.shape), a.nbytes] for n, a in sorted(arrays.items())]
        payload = np.concatenate([np.frombuffer(arrays[n].tobytes(), np.uint8) for n, _, _ in rows])
        facts = {n: told[n] for n in ("run", "round", "config")} | {"examples": examples, "metrics": {"loss": 1.0, "steps": 1, "seconds": 0.0}}
        return Message(to_content(facts, Packed(json.dumps(rows, separators=(",", ":")), payload)), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        told = facts_of(message)
        value = float(unpack(packed_of(message), WHOLE)["head.weight"].mean())
        return Message(to_content({n: told[n] for n in ("run", "round", "config")} | {"loss": abs(value), "correct": 5, "examples": 10}), reply_to=message)

    with tempfile.TemporaryDirectory() as folder:
        config = load(f"codec=float32 recipe.warmup=0 rounds={ROUNDS} quorum=0.7 retries=2 wait=2 timeout=0.2 output={folder}")
        grid = Faulty(app, clients, fault)
        journal = Journal(config, "faults")
        try:
            summary = federate(grid, config, journal)
        except Exception as error:
            return f"ends: {error}", None
        made = {n: t.numpy() for n, t in load_adapter(journal.folder / "adapter.safetensors").items()}
    refused = ", ".join(f"{n} x {code}" for code, n in summary["refused"].items())
    return (f"left out: {refused}" if refused else "completes"), made


def stock(fault: Fault | None, clients: int) -> tuple[str, Arrays | None]:
    """What Flower's FedAvg makes of it, at its defaults but that all clients train and none evaluates."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = context.node_config["partition-id"]
        if fault and client == BAD and fault.replies == "error":
            raise RuntimeError("/home/someone/pictures/7.png cannot be read")
        arrays, examples = difference(client, fault)
        given = {n: a.numpy() for n, a in message.content["arrays"].items()}
        sent = {n: (given[n] + a).astype(a.dtype) if n in given and a.shape in (given[n].shape, (1, 1)) and a.size == given[n].size else a for n, a in arrays.items()}
        content = RecordDict({"arrays": ArrayRecord({n: Array(a) for n, a in sent.items()}), "metrics": MetricRecord({"num-examples": examples})})
        return Message(content, reply_to=message)

    grid = Faulty(app, clients, fault)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            result = FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord({n: Array(a) for n, a in START.items()}), num_rounds=ROUNDS, timeout=1)
    except Exception as error:
        return f"the run fails: {type(error).__name__}", None
    lost = ROUNDS - len(result.train_metrics_clientapp)
    made = {n: a.numpy() for n, a in result.arrays.items()} or dict(START)
    return ("completes" + (f", {lost} round lost without a word" if lost else "")), made


def off(made: Arrays | None, honest: Arrays) -> float | None:
    """The largest distance from what the honest clients alone come to; nan where it is no number, None without an adapter."""
    if made is None:
        return None
    if set(made) != set(honest) or any(made[n].shape != honest[n].shape for n in honest):
        return float("inf")
    return float(max(np.abs(made[n].astype(np.float64) - honest[n]).max() for n in honest))


class Line(NamedTuple):
    """One fault on both sides: how the run ended, and how far ``off`` its adapter is."""

    fault: str
    stock: str
    stock_off: float | None
    ours: str
    ours_off: float | None


def measure(fault: Fault) -> Line:
    """Both sides under ``fault``, and what they are measured by: the six alone, or with what of the seventh is sound."""
    said, found = zip(*(beside(side, fault) for side in (stock, ours)))
    return Line(fault.name, said[0], found[0], said[1], found[1])


def beside(side: Callable, fault: Fault) -> tuple[str, float | None]:
    """How the run ended on one ``side``, and how far off."""
    sound = {"old": Fault("", replies="first"), "twice": Fault(""), "nobody's": Fault("")}.get(fault.replies)
    says, made = side(fault, HONEST + 1)
    return says, off(made, _reference(side, sound, HONEST + bool(sound)))


@lru_cache
def _reference(side: Callable, sound: Fault | None, clients: int) -> Arrays:
    return side(sound, clients)[1]


def table(lines: list[Line]) -> str:
    """The lines in Markdown."""
    def shown(value: float | None) -> str:
        return "-" if value is None else "no number" if not np.isfinite(value) else f"{value:.2g}"

    head = ["| fault of one client in seven | Flower's FedAvg | off | ours | off |", "|---|---|---|---|---|"]
    return "\n".join(head + [f"| {f} | {a} | {shown(x)} | {b} | {shown(y)} |" for f, a, x, b, y in lines]) + "\n"


def main(arguments: list[str]) -> int:
    """The command; prints the table and, where asked, keeps it with the environment."""
    parser = argparse.ArgumentParser(prog="python -m simulations.audit.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for faults.md and faults.json")
    options = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()):
        lines = [measure(fault) for fault in FAULTS]
    print(table(lines), end="")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "faults.md").write_text(table(lines))
        (options.out / "faults.json").write_text(json.dumps({"environment": environment(), "lines": [line._asdict() for line in lines]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
