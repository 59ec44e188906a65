"""A whole federation three ways: ours in process, ours on Ray, and the peer app flower_vit/ on Ray.

The same work: ten clients of CIFAR-10, three rounds of one epoch, batch 32, ViT 32/4, crop, flip and encryption in every
epoch, AdamW. Ray gets one worker, as the run in process has one: the ratio is then of work, not of cores. The peer does
not evaluate; ours evaluates ten images at the end. The steady round is the second: the first starts workers and models, and
in the last ours evaluates. The three take turns, A, B, C / C, B, A / ..., so that a ratio is of neighbours in time.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from fl import keys
from fl.provenance import ROOT
from simulations.bench.apps import report
from simulations.bench.flower_vit.task import peft
from simulations.bench.pairs import spread
from simulations.bench.report import Check, Options, Row, Section
from simulations.launch import EngineError, engine

CLIENTS, BATCH, ROUNDS = 10, 32, 3
PEER, RAY, HERE = "peer app on Ray", "ours on Ray", "ours in process"
IN_PROCESS = f"""
import sys
from clients.client_app import app as client
from simulations.inprocess import run
from strategies.server_app import app as server
run(server, client, {CLIENTS}, sys.argv[1])
"""


class Run(NamedTuple):
    """One federation: wall seconds with its start and end, of its steady round, and of the clients' training in that."""

    wall: float
    round: float
    train: float

    @property
    def overhead(self) -> float:
        """What the round took beyond the training in it, as a share of that; one worker trains."""
        return self.round / self.train - 1


def run(options: Options, step: str = "") -> list[Section]:
    """The table; ``step`` are more overrides for ours. Without --data there is none."""
    if options.data is None or not (options.data / "cifar-10-batches-py").is_dir():
        print("whole: SKIPPED, since it needs CIFAR-10; add --data DIR, where DIR holds cifar-10-batches-py", flush=True)
        return []
    peft()  # better missed now than on a worker
    images, root = 40 if options.quick else 200, str(options.data.resolve())
    runs: dict[str, list[Run]] = {PEER: [], RAY: [], HERE: []}
    with tempfile.TemporaryDirectory(prefix="veilora-whole-") as folder:
        keys.create(Path(folder) / "key")
        for pair in range(1 if options.quick else options.pairs):
            home = Path(folder) / str(pair)
            home.mkdir()
            words = overrides(root, Path(folder) / "key", images) + shlex.split(step)
            ways = {PEER: partial(peer, root, images), RAY: partial(on_ray, words, home), HERE: partial(in_process, words, home)}
            for name in list(ways)[:: -1 if pair % 2 else 1]:
                runs[name].append(ways[name]())
    title = f"{CLIENTS} clients of {images} images, {ROUNDS} rounds, ViT 32/4, one worker, wall"
    return [Section("whole", title, PEER, rows(runs, images))]


def rows(runs: dict[str, list[Run]], images: int) -> list[Row]:
    """For each way its steady round, and its wall time with the engine's start."""
    found = []
    for name, targets in ((PEER, None), (RAY, (2.0, 10)), (HERE, (2.5, 3))):
        own, peers = runs[name], runs[PEER]
        steady = spread([p.round / o.round for p, o in zip(peers, own, strict=True)])
        overhead = median(run.overhead for run in own)
        checks = () if targets is None else (
            Check(steady.median, ">=", targets[0], "x peer"),
            Check(100 * overhead, "<=", targets[1], " % overhead"),
        )
        seconds = median(run.round for run in own)
        speed = CLIENTS * images / seconds
        limit = f"training alone {median(run.train for run in own):.1f} s; {overhead:.1%} overhead; {speed:.0f} img/s"
        found.append(Row(f"{name}, a steady round", seconds, "s", steady, limit, checks))
        walls = spread([p.wall / o.wall for p, o in zip(peers, own, strict=True)])
        found.append(Row(f"{name}, all with its start", median(run.wall for run in own), "s", walls))
    return found


def overrides(root: str, key: Path, images: int) -> list[str]:
    """Our config of the same work."""
    model = "model=vit_tiny model.name=vit_tiny_patch16_224 model.image=32 model.patch=4 model.weights=none"
    shape = "+model.embed_dim=192 +model.depth=6 +model.num_heads=3"
    data = f"data=cifar10 data.root={root} data.train={CLIENTS * images} data.test={CLIENTS}"
    recipe = f"recipe.batch={BATCH} recipe.augment=true recipe.clip=0"
    return f"{model} {shape} {data} {recipe} rounds={ROUNDS} evaluate_every={ROUNDS} key={key} device=cpu".split()


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
    """What the only run below ``output`` left of its second round."""
    line = json.loads(next(output.glob("*/rounds.jsonl")).read_text().splitlines()[1])
    return Run(wall, line["seconds"], line["train_seconds"])


def peer(root: str, images: int) -> Run:
    """The peer on an engine of its own."""
    began = time.monotonic()
    with engine() as own:
        settings = {"root": root, "images": images, "batch": BATCH, "rate": 1e-3, "rounds": ROUNDS}
        found = report(own, "flower_vit", CLIENTS, 1, settings)
    ends = found["ends"]
    return Run(time.monotonic() - began, ends[2] - ends[1], found["train"][1])
