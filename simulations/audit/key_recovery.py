"""Does the server learn the cipher's key from what reaches it? The attack, run against one round of our own federation.

    python -m simulations.audit.key_recovery --out DIR [--keys N] [--chains N] [Hydra overrides; commas make a grid]

The attacker has the patch-embedding part of round 1's messages, and plain pictures like those trained on (the data's test
pictures); no key, no encrypted picture, no run of the model. `simulations.audit.structure` finds the order of the block's
values. It meets

    clear            public start (the paper's), each client's update        gives the key
    clear mean       their FedAvg mean: what secure aggregation leaves       gives the key
    keyed clear      keyed start, each client's update                       chance: the updates are plain training's
    sealed float32   the sealed messages of the public start, as float32     chance
    sealed words     the same as fixed-point integers                        chance
    sealed sum       their sum as the blind server holds it                  chance
    opened sum       that sum with the masks off, for which one needs the key: as clear mean, so the attack was in order

``exact`` is the share of places found, ``sym`` the same after the best of the block's 48 symmetries, which turn a picture
into one that looks as plain: 5.6 bits left of log2 48! = 203 at patch 4. ``plain`` is sym against the order of plain blocks:
near 1 where the attack finds that nothing was moved. Chance is the mean over random orders, and their 99th percentile.

The cheapest round that reliably gives the key is the default one: AdamW, 5 clients of 400 drawn pictures at patch 4, one epoch,
each client's update seen. A mean has fewer columns to judge by: not every search ends at the key, and ``--chains`` is for that.
Finished keys are lines of DIR/key_recovery.jsonl and are not done again; DIR/key_recovery.md is the table.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Sequence

import numpy as np
import torch

from clients import local
from fl import seal_key
from fl.adapter import PATCH_EMBED, Adapter, flat, mean
from fl.config import Config, ConfigError, build, load
from fl.datasets.images import resize
from fl.flat import places
from fl.provenance import environment
from fl.randomness import derive
from fl.wire.masks import Terms, open_total, seal, signed
from fl.wire.sealed import add, split
from simulations.audit.structure import CHAINS, chance, covariance, recover, shares, symmetries
from simulations.grid import Cell, Line, cells, identity, keep, read
from strategies import ClientInfo
from strategies.plan import orders

BASE = {"clients": "5", "model.patch": "4"}
SOLVED = 0.9       # sym from which on a key counts as recovered
PICTURES = 2000    # plain ones, at most, that the attacker looks at
TABLE = ("subject", "exact", "sym", "plain", "keys recovered", "seconds")


def seen(config: Config) -> tuple[dict[str, list[np.ndarray]], np.ndarray, np.ndarray]:
    """What an attacker sees, by its name in the list above, (d, n) each; C of plain pictures; the order that is the secret."""
    keyed, clear = (first_round(config.model_copy(update={"start": start})) for start in ("keyed", "public"))
    client, (update, _) = local.open_client(config, 0, config.clients), clear[0]
    if PATCH_EMBED not in update:
        raise ConfigError("the key is sought in the patch embedding, which this method does not send; choose method=lora_patch")
    count, terms = len(array(update)), Terms(bits=32, most=len(clear), largest=max(images for _, images in clear))
    hides = seal_key.fresh()
    sealed = [seal(hides, "audit", 1, k, array(u), images, 0.0, terms) for k, (u, images) in enumerate(clear)]
    total = add(sealed, count, terms.bits)

    def words(payload: np.ndarray) -> np.ndarray:
        return signed(split(payload, terms.bits)[0], terms.bits)

    messages = {
        "clear": [array(u) for u, _ in clear],
        "clear mean": [array(mean(*zip(*clear)))],
        "keyed clear": [array(u) for u, _ in keyed],
        "sealed float32": [np.nan_to_num(s.payload[: 4 * count].view("<f4"), posinf=0, neginf=0) for s in sealed],
        "sealed words": [words(s.payload) for s in sealed],
        "sealed sum": [words(total.payload)],
        "opened sum": [open_total(hides, "audit", 1, total, count, terms).mean],
    }
    start, end, (width, *_) = places(flat(update).layout)[PATCH_EMBED]  # the layout is public
    block = config.model["patch"]
    secret = client.cipher.encrypt(torch.arange(3 * block**2).view(1, 3, block, block)).flatten().numpy()
    pictures = resize(client.holdings.test.source.images[:PICTURES], config.model["image"])
    columns = {name: [m[start:end].astype(np.float64).reshape(width, -1) for m in many] for name, many in messages.items()}
    return columns, covariance(pictures, block), secret


def array(adapter: Adapter) -> np.ndarray:
    """All values of an adapter, float32 (n,), as they lie in a message."""
    return flat(adapter).buffer.numpy()


def first_round(config: Config) -> list[tuple[Adapter, int]]:
    """The updates of round 1 as `simulations.loop` has them from its clients, each with its number of images."""
    clients = [local.open_client(config, i, config.clients) for i in range(config.clients)]
    strategy = build(config.strategy, recipe=config.recipe)
    state = strategy.init(clients[0].bench.start)
    updates = []
    for client in clients:
        info = ClientInfo(client.index, client.holdings.train.size, client.shard.size, client.rank)
        updates.append(local.train(client, 1, *orders(strategy, config, state, 1, info))[:2])
    return updates


def attack(config: Config, chains: int = CHAINS) -> dict[str, dict[str, float]]:
    """exact, sym, plain and seconds of every subject."""
    subjects, plain, secret = seen(config)
    likes, results = symmetries(config.model["patch"]), {}
    for name, updates in subjects.items():
        began = time.monotonic()
        found = recover(updates, plain, np.random.default_rng(derive(config.seed, "attack", name)), chains)
        exact, sym = shares(found, secret, likes)
        plainly = shares(found, np.arange(len(found)), likes)[1]
        results[name] = {"exact": exact, "sym": sym, "plain": plainly, "seconds": round(time.monotonic() - began, 1)}
    return results


def composed(cell: Cell, key: Path, number: int) -> Config:
    """The config of the paper's scheme under key ``number``, which is written to ``key``: always the same bytes."""
    key.touch(mode=0o600)
    key.write_bytes(hashlib.sha256(f"audit key {number}".encode()).digest())
    config = load(shlex.join([f"{k}={v}" for k, v in (BASE | cell | {"start": "public", "key": str(key)}).items()]))
    if not config.clients:
        raise ConfigError("clients must be a number here, got 0")
    return config


def table(lines: Sequence[Line]) -> str:
    """Markdown: for each cell a row for each subject, means over keys, of sym also the range."""
    text, ruled = [], [f"| {' | '.join(TABLE)} |", "|---" * len(TABLE) + "|"]
    for cell in dict.fromkeys(line["cell"] for line in lines):
        mine = [line for line in lines if line["cell"] == cell]
        level = " · ".join(f"{name} {m:.3f} (99 % below {q:.3f})" for name, (m, q) in mine[0]["chance"].items())
        text += [f"`{cell or 'defaults'}`, {len(mine)} keys, chance: {level}", "", *ruled]
        for name in mine[0]["found"]:
            of = {what: [line["found"][name][what] for line in mine] for what in ("exact", "sym", "plain", "seconds")}
            sym = f"{statistics.mean(of['sym']):.2f} ({min(of['sym']):.2f} to {max(of['sym']):.2f})"
            solved = f"{sum(s >= SOLVED for s in of['sym'])} of {len(mine)}"
            exact, plain, seconds = (statistics.mean(of[what]) for what in ("exact", "plain", "seconds"))
            text.append(f"| {name} | {exact:.2f} | {sym} | {plain:.2f} | {solved} | {seconds:.1f} |")
        text.append("")
    return "\n".join(text)


def main(arguments: list[str]) -> int:
    """The command. Returns 0, or 2 for a config that cannot be attacked."""
    name = "python -m simulations.audit.key_recovery"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of key_recovery.jsonl and key_recovery.md")
    parser.add_argument("--keys", type=int, default=5, help="how many keys (default 5)")
    parser.add_argument("--chains", type=int, default=CHAINS, help=f"independent searches for each (default {CHAINS})")
    options, overrides = parser.parse_known_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    store = options.out / "key_recovery.jsonl"
    finished = {(line["cell"], line["chains"], line["key"]) for line in read(store)}
    origin = {k: v for k, v in environment().items() if k in ("machine", "gpu", "commit", "code")}
    for cell in cells(overrides):
        asked = {"cell": identity(cell), "chains": options.chains}
        command = f"{name} --keys {options.keys} --chains {options.chains} {identity(cell)}".strip()
        for number in range(options.keys):
            if (*asked.values(), number) in finished:
                continue
            try:
                with tempfile.TemporaryDirectory() as folder:
                    config = composed(cell, Path(folder) / "key", number)
                    found = attack(config, options.chains)
            except ConfigError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            level = chance(symmetries(config.model["patch"]))
            keep(store, asked | {"key": number, "found": found, "chance": level, "command": command} | origin)
            print(f"key {number}  " + "  ".join(f"{what} {of['sym']:.2f}" for what, of in found.items()), flush=True)
    if lines := read(store):
        (options.out / "key_recovery.md").write_text(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
