"""What a tuning tried, from the lines of tuning.jsonl: families of cells and their mean accuracy with each candidate."""

from __future__ import annotations

import statistics
from typing import NamedTuple, Sequence

from simulations.grid import Line
from simulations.report.numbers import TASK


class Judged(NamedTuple):
    """A candidate's mean accuracy in percent over its runs, and how many of these diverged, which counts as 0."""

    accuracy: float
    runs: int
    diverged: int


class Trials(NamedTuple):
    """``families[family][candidate]``, which are ``chosen`` for the grid, and the ``edges`` of what was tried on a single axis.

    ``on`` is what the trials have in common and the grid has not.
    """

    candidates: list[str]
    families: dict[str, dict[str, Judged]]
    chosen: dict[str, set[str]]
    edges: set[str]
    on: str


def trials(tuning: Sequence[Line], lines: Sequence[Line]) -> Trials | None:
    """The trials of lines that name what they tuned; None where there is none (older lines do not)."""
    tuning = [line for line in tuning if line.get("tuned")]
    if not tuning:
        return None
    runs: dict[str, dict[str, list[Line]]] = {}
    for line in tuning:
        runs.setdefault(_family(line), {}).setdefault(_candidate(line), []).append(line)
    common = set.intersection(*(set(name.split()) for name in runs))
    common -= {w for w in common if len(runs) == 1 and w.startswith("strategy=")}
    own = {name: [w for w in name.split() if w not in common] for name in runs}
    label = {name: " ".join(w.removeprefix("strategy=") for w in words) or "all" for name, words in own.items()}
    judged = {
        label[name]: {
            c: Judged(100 * statistics.mean(m["accuracy"] for m in found), len(found), sum("failed" in m for m in found))
            for c, found in by.items()
        }
        for name, by in runs.items()
    }
    chosen: dict[str, set[str]] = {name: set() for name in judged}
    for name, words in own.items():
        chosen[label[name]] |= {_candidate(m) for m in lines if m.get("tuned") and set(words) <= set(m["cell"].split())}
    tried = {_candidate(line): tuple(float(v) for v in line["tuned"].values()) for line in tuning}
    order = sorted(tried, key=tried.__getitem__)
    edges = {order[0], order[-1]} if len(order) > 2 and all(len(v) == 1 for v in tried.values()) else set()
    on = shared(tuning) - shared(lines)
    return Trials(order, judged, chosen, edges, " ".join(sorted(on)))


def shared(lines: Sequence[Line]) -> set[str]:
    """The words that all cells have."""
    return set.intersection(*(set(line["cell"].split()) for line in lines)) if lines else set()


def _family(line: Line) -> str:
    """The words of a cell without seed, task and what was tuned."""
    words = (w for w in line["cell"].split() if (key := w.split("=")[0]) != "seed" and key not in line["tuned"])
    return " ".join(w for w in words if w.split("=")[0].split(".")[0] not in TASK)


def _candidate(line: Line) -> str:
    return " ".join(f"{k.split('.')[-1]}={v}" for k, v in line["tuned"].items())
