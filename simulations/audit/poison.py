"""Clients that send what they like: what each aggregation rule makes of them, in real federated runs.

    python -m simulations.audit.poison --out DIR [--attackers 2] [--attacks none,sign_flip] strategy=fedavg,median seed=0,1,2

Arguments are Hydra overrides, as `simulations.compare` takes them; the gate's bound on an update's length is off. Every cell
is run once with each attack by the plain loop, its last clients hostile; each finished run is a line of DIR/poison.jsonl, and
DIR/poison.md is the table. The attackers see the honest updates of the round before they send theirs, which is more than an
outsider could.

    none         they work as the others do
    label_flip   they train on labels y -> classes - 1 - y
    sign_flip    -u: what they found, backwards
    scaling      100 u: a model replacement
    gaussian     noise of ten times the honest updates' root mean square
    little       mean - 1.5 sd of the honest updates, value by value: "A little is enough" (Baruch et al., arXiv 1902.06156)
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
from torch import Generator

from clients import local
from fl.adapter import Adapter, count, flat, mean, norm
from fl.config import ConfigError
from fl.flat import Flat
from fl.journal import run_name
from fl.learn import TrainingError
from fl.provenance import environment
from fl.randomness import generator
from fl.recipe import Recipe
from fl.wire.flat import WireError
from simulations import loop
from simulations.grid import Cell, Line, Quiet, cells, check, configured, identity, keep, read
from strategies.gate import Refused

Attack = Callable[[Adapter, Sequence[Adapter], Generator], Adapter]
"""``attack(own, honest, stream)``: what is sent instead of the ``own`` update, the round's ``honest`` ones being known."""


def scaled(own: Adapter, by: float) -> Adapter:
    """``by`` times the update."""
    update = flat(own)
    return Flat(update.buffer * by, update.layout)


def gaussian(own: Adapter, honest: Sequence[Adapter], stream: Generator) -> Adapter:
    """Noise in the shape of an update, ten times as long as the honest ones are on the average."""
    update = flat(own)
    size = 10 * statistics.mean(norm(u) for u in honest) / count(own) ** 0.5
    return Flat(size * torch.randn(update.buffer.shape, generator=stream), update.layout)


def little(own: Adapter, honest: Sequence[Adapter], stream: Generator) -> Adapter:
    """Below the honest mean by 1.5 of their standard deviations, in every value: too little to stand out."""
    middle = flat(mean(honest, [1] * len(honest)))
    spread = torch.stack([flat(u).buffer for u in honest]).std(0, correction=min(1, len(honest) - 1))
    return Flat(middle.buffer - 1.5 * spread, middle.layout)


ATTACKS: dict[str, Attack] = {
    "none": lambda own, honest, stream: own,
    "label_flip": lambda own, honest, stream: own,  # what they train on is the attack: see `flipped`
    "sign_flip": lambda own, honest, stream: scaled(own, -1),
    "scaling": lambda own, honest, stream: scaled(own, 100),
    "gaussian": gaussian,
    "little": little,
}


def flipped(client: local.Client) -> local.Client:
    """The client with the labels of its training images reversed."""
    train = client.holdings.train
    last = len(client.holdings.classes) - 1
    source = train.source._replace(labels=last - train.source.labels)
    return replace(client, holdings=client.holdings._replace(train=train._replace(source=source)))


def hostile(name: str, attackers: int, seed: int) -> loop.Train:
    """`clients.local.train`, but that the last ``attackers`` clients do as the attack ``name`` does."""
    honest: list[Adapter] = []
    now = 0

    def train(client: local.Client, round: int, recipe: Recipe, *more: Any) -> tuple[Adapter, int, dict[str, float]]:
        nonlocal now
        if round != now:
            now = round
            honest.clear()
        if client.index < client.of - attackers:
            update, examples, metrics = local.train(client, round, recipe, *more)
            honest.append(update)
            return update, examples, metrics
        who = flipped(client) if name == "label_flip" else client
        update, examples, metrics = local.train(who, round, recipe, *more)
        if honest:  # with none in the cohort there is nobody to hide behind
            update = ATTACKS[name](update, honest, generator(seed, "attack", round, client.index))
        return update, examples, metrics

    return train


def run(cell: Cell, name: str, attackers: int, folder: str) -> Line:
    """Run one cell under one attack. Returns its line; a run that failed has the reason instead of an accuracy."""
    local.SHELF.kept.clear()  # labels of another attack may lie there
    line = {"cell": identity(cell), "attack": name, "attackers": attackers}
    origin = {k: v for k, v in environment().items() if k in ("machine", "gpu", "commit", "code")}
    try:
        with configured({"gate.norm": "1e9"} | cell, folder) as config:  # what the gate would stop is the rule's to stop here
            summary = loop.run(config, Quiet(config, run_name(config)), hostile(name, attackers, config.seed))
    except (TrainingError, Refused, WireError) as error:
        return line | {"failed": str(error)} | origin
    return line | {k: summary[k] for k in ("accuracy", "clients", "train_examples", "examples")} | origin


def table(lines: Sequence[Line]) -> str:
    """Markdown: a row for each cell but for its seed, a column for each attack; mean ± sample sd of the accuracy in percent."""
    found: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        name = " ".join(w for w in line["cell"].split() if not w.startswith("seed="))
        found.setdefault(name, {}).setdefault(line["attack"], []).append(line)
    common = set.intersection(*(set(name.split()) for name in found))
    columns = [name for name in ATTACKS if any(name in row for row in found.values())]
    rows = [f"| rule | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, row in found.items():
        label = " ".join(w.removeprefix("strategy=") for w in sorted(set(name.split()) - common, key=lambda w: not w.startswith("strategy=")))
        rows.append(f"| {label or '-'} | {' | '.join(figure(row.get(column, [])) for column in columns)} |")
    shared = " ".join(sorted(common))
    return f"{lines[0]['attackers']} attackers of {lines[0].get('clients', '?')} clients; all runs: `{shared}`\n\n" + "\n".join(rows) + "\n"


def figure(lines: Sequence[Line]) -> str:
    """Mean ± sd of those that ended, and how many did not."""
    ended = [100 * line["accuracy"] for line in lines if "accuracy" in line]
    failed = f"{len(lines) - len(ended)} of {len(lines)} failed" if len(ended) < len(lines) else ""
    spread = f" ± {statistics.stdev(ended):.1f}" if len(ended) > 1 else ""
    return "; ".join(filter(None, [f"{statistics.mean(ended):.1f}{spread}" if ended else "", failed])) or "-"


def main(arguments: list[str]) -> int:
    """The command. Returns 0, or 2 for a config that cannot run."""
    parser = argparse.ArgumentParser(prog="python -m simulations.audit.poison", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of poison.jsonl and poison.md")
    parser.add_argument("--attackers", type=int, default=2, help="the last so many clients are hostile (default 2)")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="of " + ", ".join(ATTACKS))
    options, overrides = parser.parse_known_args(arguments)
    if unknown := sorted(set(options.attacks.split(",")) - set(ATTACKS)):
        parser.error(f"no attack {unknown[0]!r}; there are {', '.join(ATTACKS)}")
    try:
        wanted = cells(overrides) if overrides else []
        check(wanted)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    store = options.out / "poison.jsonl"
    finished = {(line["cell"], line["attack"], line["attackers"]) for line in read(store)}
    for cell in wanted:
        for name in options.attacks.split(","):
            if (identity(cell), name, options.attackers) not in finished:
                line = run(cell, name, options.attackers, str(Path("~/veilora/runs").expanduser()))
                keep(store, line)
                print(f"{figure([line]):>16}  {name:<10}  {line['cell']}", flush=True)
    if lines := read(store):
        (options.out / "poison.md").write_text(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
