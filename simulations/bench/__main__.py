"""Measure this project beside its peers and the machine.

    python -m simulations.bench [step gpu together cipher data aggregate products sealing rounds whole]
                                [--pairs 5] [--out DIR] [--data DIR] [--quick]

Each section prints its tables and leaves ``<out>/<section>.json``; ``<out>/README-table.md`` holds the tables of all.
Peers need the extra ``test`` (peft) and ``sim`` (Ray).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from simulations.bench import aggregate, cipher, data, gpu, products, rounds, sealing, step, together, whole
from simulations.bench.report import Options, markdown, save
from simulations.launch import EngineError

SECTIONS = {
    "step": step, "gpu": gpu, "together": together, "cipher": cipher, "data": data, "aggregate": aggregate, "products": products,
    "sealing": sealing, "rounds": rounds, "whole": whole,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """The command. Returns 0, whatever the targets say, or 4 when an engine failed."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved repeats (default 5)")
    parser.add_argument("--out", type=Path, help="folder for the JSON files and the tables")
    parser.add_argument("--data", type=Path, help="folder that holds cifar-10-batches-py, for the section whole")
    parser.add_argument("--quick", action="store_true", help="less of everything: no ViT-B, no Ray in rounds")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.sections if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if asked.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {asked.pairs}")
    torch.set_num_threads(1)
    options = Options(asked.pairs, asked.quick, asked.data)
    for name in asked.sections or SECTIONS:
        began, load, found = time.monotonic(), os.getloadavg()[0], []
        try:
            for section in SECTIONS[name].run(options):
                print(markdown(section), flush=True)
                found.append(section)
        except EngineError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 4
        if found and asked.out:
            save(found, name, options, load, asked.out)
        print(f"{name}: {time.monotonic() - began:.0f} s, load {load:.1f} -> {os.getloadavg()[0]:.1f}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
