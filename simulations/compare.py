"""Run a grid of configs and report it: every cell a real run of the plain loop, finished cells skipped.

    python -m simulations.compare --out DIR [--jobs N] strategy=fedavg,flexlora partition=iid,dirichlet seed=0,1,2
    python -m simulations.compare --out DIR --tune recipe.lr.lora_a=3e-3,1e-2,3e-2 strategy=fedavg,flexlora seed=0,1,2

Arguments are Hydra overrides; a comma-separated value is an axis, as in Hydra's multirun. Each finished cell is one line
of DIR/cells.jsonl, so a grid that was stopped goes on where it was. With --tune, each strategy's rate is first chosen on a
held-out seed and validation images (DIR/tuning.jsonl). It ends in DIR/report.html, .md and .csv; with no override at all
these are only written anew.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Sequence

from fl.config import ConfigError
from fl.journal import span
from fl.learn import TrainingError
from fl.provenance import code_digest
from fl.wire.flat import WireError
from simulations.grid import Cell, cells, check, identity, keep, missing, read, room, run_side_by_side
from simulations.report.page import write
from simulations.tuning import HELD_OUT, Tuning
from strategies.gate import Refused


def finish(wanted: Sequence[Cell], store: Path, jobs: int, tuned: Sequence[str] = (), failures_count: bool = False) -> int:
    """Run those of the cells that ``store`` has not, and keep them there. Returns how many failed.

    The line of a cell names the ``tuned`` settings. With ``failures_count`` a training that diverged is a result, too, of
    accuracy 0.
    """
    lines = read(store)
    todo = missing(wanted, lines)
    older = sum(line.get("code") != code_digest() for line in lines)
    print(f"{len(todo)} cells to run, {len(lines)} in {store}" + (f", {older} of them by other code" if older else ""), flush=True)
    began, failed, folder = time.monotonic(), 0, str(Path("~/veilora/runs").expanduser())
    common = set.intersection(*(set(identity(cell).split()) for cell in wanted)) if wanted else set()
    jobs = min(jobs or room(todo), len(todo)) or 1
    for number, (cell, line) in enumerate(run_side_by_side(todo, jobs, folder), 1):
        if failures_count and isinstance(line, (TrainingError, Refused, WireError)):
            line = {"cell": identity(cell), "accuracy": 0.0, "seconds": 0.0, "failed": str(line), "code": code_digest()}
        left = span((time.monotonic() - began) / number * (len(todo) - number))
        where = f"{number}/{len(todo)}" + (f", about {left} left" if number < len(todo) else "")
        name = " ".join(word for word in identity(cell).split() if word not in common) or "-"
        if isinstance(line, Exception):
            failed += 1
            print(f"failed: {name}: {line}  [{where}]", file=sys.stderr, flush=True)
            continue
        keep(store, line | {"tuned": {key: cell[key] for key in tuned}} if tuned else line)
        said = "diverged" if "failed" in line else f"{line['accuracy']:7.2%}  {line['seconds']:6.1f} s"
        print(f"{said}  {name}  [{where}]", flush=True)
    return failed


def tune(grid: list[Cell], tuning: Tuning, store: Path, jobs: int) -> tuple[list[Cell], int]:
    """The grid's cells with the values that its tuning chose, and how many have none because their tuning failed."""
    tuning.check(grid)
    keys = list(tuning.candidates[0])
    finish(tuning.runs(grid), store, jobs, keys, failures_count=True)
    chosen = tuning.choose(grid, read(store))
    for family, values in chosen.items():
        print(f"chosen: {identity(values)} for {family or 'all'}", flush=True)
    for family in sorted({tuning.family(cell) for cell in grid} - set(chosen)):
        print(f"failed: no {' '.join(keys)} could be chosen for {family or 'all'}; see {store}", file=sys.stderr, flush=True)
    tuned = [cell | chosen[tuning.family(cell)] for cell in grid if tuning.family(cell) in chosen]
    return tuned, len(grid) - len(tuned)


def main(arguments: list[str]) -> int:
    """The command. Returns 0, 2 for what cannot run, 4 when a cell failed (the others are kept), 130 when stopped."""
    options, overrides = _parser().parse_known_args(arguments)
    axes, failed = options.tune, 0
    try:
        grid, keys = cells(overrides) if overrides else [], list(cells(axes)[0]) if axes else []
        check(missing(grid, read(options.out / "cells.jsonl")))
        tuning = Tuning(axes, options.tune_on.split(), options.tune_shared.replace(",", " ").split()) if grid and axes else None
        if tuning:
            check(missing(tuning.runs(grid), read(options.out / "tuning.jsonl")))
        options.out.mkdir(parents=True, exist_ok=True)
        if tuning:
            grid, failed = tune(grid, tuning, options.out / "tuning.jsonl", options.jobs)
        failed += finish(grid, options.out / "cells.jsonl", options.jobs, keys)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    if lines := read(options.out / "cells.jsonl"):
        print(f"report: {write(options.out, lines, read(options.out / 'tuning.jsonl'), options.target)}")
    return 4 if failed else 0


def target(text: str) -> float:
    """A number in (0, 1]. Raises ValueError."""
    if not 0 < (value := float(text)) <= 1:
        raise ValueError(text)
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations.compare", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of cells.jsonl and the report")
    parser.add_argument("--jobs", type=int, default=0, help="cells run side by side; by default one a GPU, else one a core")
    parser.add_argument("--tune", action="append", default=[], metavar="KEY=A,B,C", help="values to try for each strategy")
    parser.add_argument("--tune-on", default=HELD_OUT, metavar="OVERRIDES", help=f"where to try them; by default {HELD_OUT!r}")
    parser.add_argument("--tune-shared", default="partition", metavar="KEYS", help="axes that share a choice; by default partition")
    parser.add_argument("--target", type=target, metavar="ACCURACY", help="in (0, 1], to count rounds and MB to; else 95%% of the best")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
