"""A whole federation three ways: ours in process, ours on Ray, and the peer app flower_vit/ on Ray.

The same work: ten clients of CIFAR-10, four rounds of one epoch, batch 32, ViT 32/4, crop, flip and encryption in every
epoch, AdamW. Ray gets one worker, as the run in process has one: the ratio is then of work, not of cores. The peer does
not evaluate; ours evaluates ten images at the end. Steady rounds are all but the first, which starts workers and models,
and the last, in which ours evaluates.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from fl import keys
from fl.provenance import ROOT
from simulations.bench.apps import report
from simulations.bench.flower_vit.task import peft
from simulations.bench.pairs import spread
from simulations.bench.report import Check, Options, Row, Section
from simulations.launch import EngineError, engine

CLIENTS, BATCH = 10, 32
PEER, RAY, HERE = "peer app on Ray", "ours on Ray", "ours in process"
IN_PROCESS = f"""
import sys
from clients.client_app import app as client
from simulations.inprocess import run
from strategies.server_app import app as server
run(server, client, {CLIENTS}, sys.argv[1])
"""


class Run(NamedTuple):
    """One federation: wall seconds with start and end, of each steady round, and of the clients' training in it."""

    wall: float
    rounds: list[float]
    train: list[float]

    @property
    def overhead(self) -> float:
        """What the rounds took beyond the training in them, as a share of it; one worker trains."""
        return sum(self.rounds) / sum(self.train) - 1


def run(options: Options, step: str = "") -> list[Section]:
    """The table; ``step`` are more overrides for ours. Without --data there is none."""
    if options.data is None or not (options.data / "cifar-10-batches-py").is_dir():
        print("whole: SKIPPED, since it needs CIFAR-10; add --data DIR, where DIR holds cifar-10-batches-py", flush=True)
        return []
    peft()  # better missed now than on a worker
    images, rounds = (40, 3) if options.quick else (200, 4)
    root = str(options.data.resolve())
    with tempfile.TemporaryDirectory(prefix="veilora-whole-") as folder:
        home = Path(folder)
        keys.create(home / "key")
        words = overrides(root, home, images, rounds) + shlex.split(step)
        runs = {HERE: in_process(words, home), RAY: on_ray(words, home), PEER: peer(root, images, rounds)}
    title = f"{CLIENTS} clients of {images} images, {rounds} rounds, ViT 32/4, one worker, wall"
    return [Section("whole", title, PEER, rows(runs, images))]


def rows(runs: dict[str, Run], images: int) -> list[Row]:
    """For each run its steady round, and its wall time with the engine's start."""
    found = []
    for name, targets in ((PEER, None), (RAY, (2.0, 10)), (HERE, (2.5, 3))):
        own, peer = runs[name], runs[PEER]
        ratio = spread([p / o for p, o in zip(peer.rounds, own.rounds)])
        checks = () if targets is None else (
            Check(ratio.median, ">=", targets[0], "x peer"),
            Check(100 * own.overhead, "<=", targets[1], " % overhead"),
        )
        seconds = sum(own.rounds) / len(own.rounds)
        speed = CLIENTS * images / seconds
        limit = f"training alone {sum(own.train) / len(own.train):.1f} s; {own.overhead:.1%} overhead; {speed:.0f} img/s"
        found.append(Row(f"{name}, a steady round", seconds, "s", ratio, limit, checks))
        found.append(Row(f"{name}, all with its start", own.wall, "s", spread([peer.wall / own.wall])))
    return found


def overrides(root: str, home: Path, images: int, rounds: int) -> list[str]:
    """Our config of the same work."""
    model = "model=vit_tiny model.name=vit_tiny_patch16_224 model.image=32 model.patch=4 model.weights=none"
    shape = "+model.embed_dim=192 +model.depth=6 +model.num_heads=3"
    data = f"data=cifar10 data.root={root} data.train={CLIENTS * images} data.test={CLIENTS}"
    recipe = f"recipe.batch={BATCH} recipe.augment=true recipe.clip=0"
    return f"{model} {shape} {data} {recipe} rounds={rounds} evaluate_every={rounds} key={home / 'key'} device=cpu".split()


def in_process(words: list[str], home: Path) -> Run:
    """Flower's Grid in one fresh process."""
    began = time.monotonic()
    command = [sys.executable, "-c", IN_PROCESS, shlex.join([*words, f"output={home / 'here'}"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"the run in process failed: {done.stderr.strip()[-300:]}")
    return read(home / "here", time.monotonic() - began)


def on_ray(words: list[str], home: Path) -> Run:
    """`flwr run` on an engine of its own."""
    began = time.monotonic()
    with engine() as own:
        if not own.run(CLIENTS, 1, [*words, f"output={home / 'ray'}"], show=False):
            raise EngineError("our run on Ray failed")
    return read(home / "ray", time.monotonic() - began)


def read(output: Path, wall: float) -> Run:
    """What the only run below ``output`` left, without the first round and the last."""
    lines = [json.loads(line) for line in next(output.glob("*/rounds.jsonl")).read_text().splitlines()][1:-1]
    return Run(wall, [line["seconds"] for line in lines], [line["train_seconds"] for line in lines])


def peer(root: str, images: int, rounds: int) -> Run:
    """The peer on an engine of its own."""
    began = time.monotonic()
    with engine() as own:
        settings = {"root": root, "images": images, "batch": BATCH, "rate": 1e-3, "rounds": rounds}
        found = report(own, "flower_vit", CLIENTS, 1, settings)
    ends = found["ends"]
    return Run(time.monotonic() - began, [b - a for a, b in zip(ends, ends[1:])][1:-1], found["train"][1:-1])
