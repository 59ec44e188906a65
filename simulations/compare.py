"""Run a grid of configs and tabulate it: every cell a real run of the plain loop, finished cells skipped.

    python -m simulations.compare --out DIR [--jobs N] method=melo,full seed=0,1,2 rounds=6

Arguments are Hydra overrides; a comma-separated value is an axis, as in Hydra's multirun. Each finished cell is one line
of DIR/cells.jsonl, so a grid that was stopped goes on where it was. DIR/table.md holds mean ± sd over the seeds; with no
override at all it is only written anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser

from fl.config import load
from fl.journal import Journal, run_name
from fl.provenance import code_digest, environment
from simulations import loop

PLACES = ("data.root", "model.weights", "key", "output", "device", "threads", "keep")  # of one machine: never in a result


def cells(arguments: list[str]) -> list[dict[str, str]]:
    """The grid's cells as ``{override key: value}``, the last axis fastest."""
    axes = []
    for text, override in zip(arguments, OverridesParser.create().parse_overrides(arguments)):
        key, _, value = text.partition("=")
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [value]
        axes.append([(key, v) for v in values])
    return [dict(choice) for choice in itertools.product(*axes)]


def identity(cell: dict[str, str]) -> str:
    """What a cell is, whatever machine it runs on and however it was typed."""
    return " ".join(sorted(f"{k}={v}" for k, v in cell.items() if k not in PLACES))


def run_cell(cell: dict[str, str], folder: str) -> dict[str, Any]:
    """Run one cell; its output goes below ``folder``. Returns the line for cells.jsonl."""
    words = [f"{k}={v}" for k, v in cell.items()] + ([] if "output" in cell else [f"output={folder}"])
    config = load(shlex.join(words))
    journal = Quiet(config, run_name(config))
    summary = loop.run(config, journal)
    kept = ("accuracy", "loss", "seconds", "train_seconds", "ratio_to_full_fedavg", "trained_parameters", "bytes_per_client_round")
    curve = [[row["round"], row["accuracy"]] for row in journal.rounds if "accuracy" in row]
    origin = {k: v for k, v in environment().items() if k in ("machine", "gpu", "commit", "code")}
    return {"cell": identity(cell), **{k: summary[k] for k in kept}, "examples": summary["examples"], "curve": curve, **origin}


class Quiet(Journal):
    """A journal that writes and does not speak."""

    def say(self, line: str) -> None:
        pass

    progress = say


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Markdown: one row for each cell but for its seed; mean ± sample sd of the accuracy in percent, and n."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        words = sorted(w for w in line["cell"].split() if not w.startswith("seed="))
        groups.setdefault(" ".join(words), []).append(line)
    common = set.intersection(*(set(name.split()) for name in groups))
    rows = ["| cell | accuracy % | seeds | trained | bytes of full FedAvg | s |", "|---|---|---|---|---|---|"]
    for name, members in sorted(groups.items()):
        scores = [100 * m["accuracy"] for m in members]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        label = " ".join(w for w in name.split() if w not in common) or "-"
        rows.append(
            f"| {label} | {statistics.mean(scores):.2f}{spread} | {len(scores)} | {members[0]['trained_parameters']:,} "
            f"| {members[0]['ratio_to_full_fedavg']:.2%} | {statistics.median(m['seconds'] for m in members):.0f} |"
        )
    return f"Common: `{' '.join(w for w in next(iter(groups)).split() if w in common)}`\n\n" + "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    """The command. Returns 0, or 4 when a cell failed (the others are kept)."""
    parser = argparse.ArgumentParser(prog="python -m simulations.compare", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of cells.jsonl and table.md")
    parser.add_argument("--jobs", type=int, default=1, help="cells run side by side")
    options, overrides = parser.parse_known_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    store = options.out / "cells.jsonl"
    lines = [json.loads(text) for text in store.read_text().splitlines() if text.endswith("}")] if store.exists() else []
    finished = {" ".join(sorted(line["cell"].split())) for line in lines}
    older = sum(line["code"] != code_digest() for line in lines)
    todo = [cell for cell in cells(overrides) if identity(cell) not in finished] if overrides else []
    print(f"{len(todo)} cells to run, {len(finished)} in {store}" + (f", {older} of them by other code" if older else ""), flush=True)
    failed = 0
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run_cell, cell, str(Path("~/veilora/runs").expanduser())): cell for cell in todo}
        for done in as_completed(futures):
            try:
                line = done.result()
            except Exception as error:
                failed += 1
                print(f"failed: {identity(futures[done])}: {error}", file=sys.stderr, flush=True)
                continue
            lines.append(line)
            with store.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{line['accuracy']:7.2%}  {line['seconds']:6.1f} s  {line['cell']}", flush=True)
    if lines:
        (options.out / "table.md").write_text(table(lines))
    return 4 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
