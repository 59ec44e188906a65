"""Leakage: how much an honest server learns from one client's update in clear, and beside it from the same message sealed.

    python -m simulations.audit.leakage --out DIR [--seeds N] [--shadows N] [Hydra overrides]

One round of our own federation, from a keyed start: what the server holds of each client is attacked as `simulations.audit.curious`
says. ``clear`` is the update as the default codec brings it; ``sealed`` is the message of the same round under secure
aggregation, its words read as an update as long as the clear one, which tells the attacker more than the message does.

    class               is a class among the client's pictures? AUC over clients and classes, by the head's bias alone
    class fitted        the same by the regression of the histogram
    histogram           total variation between the guessed and the true shares of the classes; chance is the uniform guess
    member N x E        was a picture trained on? AUC for clients of N pictures that train E epochs

Clients of the first two have unlike classes (Dirichlet, 0.3). AUC is 0.5 by chance. Finished seeds are lines of
DIR/leakage.jsonl and are not done again; DIR/leakage.md is the table.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import numpy as np
import torch

from clients import blind, local
from clients.holdings import Share
from fl import seal_key
from fl.adapter import Adapter, flat, norm
from fl.config import Config, ConfigError, load
from fl.datasets import Examples
from fl.flat import Flat
from fl.provenance import environment
from fl.randomness import derive, generator
from fl.wire.coding import coding
from fl.wire.flat import pack, unpack
from fl.wire.masks import signed
from fl.wire.sealed import split
from simulations.audit.curious import BIAS, Histograms, auc, histogram, membership, variation
from simulations.grid import Line, keep, read
from strategies.memory import OCTETS, Memory

SIZES = ((200, 1), (200, 5), (20, 1), (20, 5))  # pictures of a client and epochs, of those whose membership is sought
FEW = 5                                         # clients of each of them
SHADOWS = 40                                    # rounds that the server trains itself
OTHERS = 200                                    # pictures that were not trained on
CHANCE = {"class": 0.5, "class fitted": 0.5, **{f"member {n} x {epochs}": 0.5 for n, epochs in SIZES}}


class Seen(NamedTuple):
    """One client's round: what it sent in clear, what its sealed message reads as, and what it trained on."""

    clear: Adapter
    sealed: Adapter
    pictures: Examples


def rounds(config: Config) -> Iterator[Seen]:
    """Round 1 of every client of ``config``."""
    wire, secure = coding(config), config.model_copy(update={"blind": True})
    for index in range(config.clients):
        client = local.open_client(config, index, config.clients)
        trained = local.train(client, 1, config.recipe, client.bench.start)
        stream = generator(config.seed, "up", 1, index)
        clear = flat(unpack(pack(trained[0], wire.differences, stream), wire.differences))
        yield Seen(clear, sealed(replace(client, config=secure), trained, clear), client.holdings.train.examples())


def sealed(client: local.Client, trained: local.Trained, like: Adapter) -> Adapter:
    """The client's sealed message of round 1, of what it ``trained``, its words read as an update as long as ``like``."""
    message, facts = next(Memory("audit", client.config.digest()).messages(client.index, 0, {"round": 1}))
    _, packed = blind.answer(client, facts, blind.ask(client, facts, message), trained)
    bits, layout = client.config.seal.bits, flat(like).layout
    words = signed(split(unpack(packed, OCTETS)["sealed.payload"].numpy(), bits)[0], bits)
    values = torch.from_numpy(words[: flat(like).buffer.numel()].astype(np.float32))
    return Flat(values * (norm(like) / float(values.double().norm())), layout)


def attacker(config: Config) -> local.Client:
    """The server's own model on plain pictures: the public start, and a key of no meaning."""
    plain = config.model_copy(update={"cipher": {"_target_": "fl.ciphers.plain.plain"}, "start": "public"})
    return local.open_client(plain, 0, plain.clients)


def shadows(config: Config, sizes: Sequence[int], number: int) -> list[tuple[Adapter, int, np.ndarray]]:
    """Updates of ``number`` rounds that the server trains on public pictures, with their histograms."""
    server, wire, known = attacker(config), coding(config), []
    public, classes = server.holdings.test.source, len(server.holdings.classes)
    pools = [np.flatnonzero((public.labels == c).numpy()) for c in range(classes)]
    for i in range(number):
        chance, images = np.random.default_rng(derive(config.seed, "shadow", i)), sizes[i % len(sizes)]
        labels = chance.choice(classes, images, p=chance.dirichlet(np.full(classes, 0.3)))
        examples = public.at(torch.from_numpy(np.array([chance.choice(pools[c]) for c in labels])))
        mine = replace(server, holdings=server.holdings._replace(train=Share(examples), name=f"shadow {i}"))
        update, _, _ = local.train(mine, 1, config.recipe, mine.bench.start)
        sent = unpack(pack(update, wire.differences, generator(config.seed, "shadow", i)), wire.differences)
        known.append((sent, images, histogram(examples.labels, classes)))
    return known


def by_class(config: Config, number: int) -> dict[str, dict[str, float]]:
    """The attacks on classes, on what every client of ``config`` sent."""
    seen = list(rounds(config))
    sizes = [len(one.pictures.labels) for one in seen]
    model = Histograms(shadows(config, sizes, number))
    classes = len(seen[0].clear[BIAS])
    truth = np.stack([histogram(one.pictures.labels, classes) for one in seen])
    guesses = {"chance": [np.full(classes, 1 / classes)] * len(seen)}
    found = {"class": {}, "class fitted": {}, "histogram": {}}
    for name in ("clear", "sealed"):
        updates = [getattr(one, name) for one in seen]
        scores = {"class": [update[BIAS].double().numpy() for update in updates], "class fitted": list(map(model.scores, updates, sizes))}
        for what, each in scores.items():
            found[what][name] = auc(np.stack(each)[truth > 0], np.stack(each)[truth == 0])
        guesses[name] = [model.guess(update, images) for update, images in zip(updates, sizes)]
    for name, guessed in guesses.items():
        found["histogram"][name] = statistics.mean(map(variation, guessed, truth))
    return found


def by_picture(config: Config) -> dict[str, float]:
    """The attack on membership: the mean AUC over the clients of ``config``."""
    seen = list(rounds(config))
    server = attacker(config)
    public = server.holdings.test.source
    others = public.at(torch.randperm(len(public.labels), generator=generator(config.seed, "others"))[:OTHERS])
    start = server.bench.start
    return {
        name: statistics.mean(membership(server, start, getattr(one, name), one.pictures, others) for one in seen)
        for name in ("clear", "sealed")
    }


def composed(overrides: Sequence[str], folder: Path, seed: int, **more: object) -> Config:
    """The config of one attack, its image key always the same bytes for a ``seed``."""
    key, seals = folder / "key", folder / "seal.key"
    if not seals.exists():
        seal_key.create(seals)
    key.touch(mode=0o600)
    key.write_bytes(hashlib.sha256(f"audit key {seed}".encode()).digest())
    words = [*overrides, f"seed={seed}", f"key={key}", f"seal_key={seals}", f"state={folder / 'state'}", "start=keyed"]
    return load(shlex.join(words + [f"{name.replace('__', '.')}={value}" for name, value in more.items()]))


def attack(overrides: Sequence[str], folder: Path, seed: int, number: int) -> dict[str, dict[str, float]]:
    """All of the list above, by name, for what is ``clear`` and what is ``sealed``."""
    found = by_class(composed(overrides, folder, seed, partition="dirichlet", clients=10, data__train=2000), number)
    for images, epochs in SIZES:
        config = composed(overrides, folder, seed, partition="iid", clients=FEW, data__train=FEW * images, recipe__epochs=epochs)
        found[f"member {images} x {epochs}"] = by_picture(config)
    return found


def table(lines: Sequence[Line]) -> str:
    """Markdown: a row for each attack, mean and range over the seeds."""

    def figure(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):.3f} ({min(values):.2f} to {max(values):.2f})"

    text = []
    for command in dict.fromkeys(line["command"] for line in lines):
        mine = [line for line in lines if line["command"] == command]
        seeds, machines = ", ".join(str(line["seed"]) for line in mine), " · ".join(dict.fromkeys(line["machine"] for line in mine))
        commits = " · ".join(dict.fromkeys(line["commit"] for line in mine))
        text += [f"`{command}`, seeds {seeds}, on {machines}, commit {commits}", "", "| what | clear | sealed | chance |", "|---|---|---|---|"]
        for name in mine[0]["found"]:
            of = {who: [line["found"][name][who] for line in mine] for who in mine[0]["found"][name]}
            chance = figure(of["chance"]) if "chance" in of else f"{CHANCE[name]:.1f}"
            text.append(f"| {name} | {figure(of['clear'])} | {figure(of['sealed'])} | {chance} |")
        text.append("")
    return "\n".join(text)


def main(arguments: list[str]) -> int:
    """The command. Returns 0, or 2 for a config that cannot be attacked."""
    name = "python -m simulations.audit.leakage"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of leakage.jsonl and leakage.md")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on (default 3)")
    parser.add_argument("--shadows", type=int, default=SHADOWS, help=f"rounds that the server trains itself (default {SHADOWS})")
    options, overrides = parser.parse_known_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    store = options.out / "leakage.jsonl"
    said = [word for word in overrides if not word.startswith(("data.root=", "model.weights=", "threads="))]
    command = f"{name} --shadows {options.shadows} {' '.join(said)}".strip()
    finished = {(line["command"], line["seed"]) for line in read(store)}
    origin = {k: v for k, v in environment().items() if k in ("machine", "gpu", "commit", "code")}
    for seed in range(options.seeds):
        if (command, seed) in finished:
            continue
        began = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = attack(overrides, Path(folder), seed, options.shadows)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        keep(store, {"command": command, "seed": seed, "found": found, "seconds": round(time.monotonic() - began, 1)} | origin)
        print(f"seed {seed}  " + "  ".join(f"{what} {of['clear']:.2f} / {of['sealed']:.2f}" for what, of in found.items()), flush=True)
    if lines := read(store):
        (options.out / "leakage.md").write_text(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
