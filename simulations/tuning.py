"""The rate of each strategy, chosen on a held-out seed and on images that neither trained nor test it.

A grid's cells that differ only in their seed, or in an axis that shares one choice (by default the partition), form a
family. Each candidate is run for every member of the family; the one with the best mean accuracy is the family's.
"""

from __future__ import annotations

import statistics
from typing import Mapping, NamedTuple, Sequence

from fl.config import ConfigError
from simulations.grid import Cell, Line, cells, identity, named

HELD_OUT = "seed=100 validation=0.5 evaluate_on=validation"


class Tuning(NamedTuple):
    """What is tried (``axes``, Hydra overrides), on what (``on``), and which axes share a choice."""

    axes: Sequence[str]
    on: Sequence[str]
    shared: Sequence[str]

    @property
    def candidates(self) -> list[Cell]:
        """Every combination of the values that are tried."""
        return cells(self.axes)

    def check(self, grid: Sequence[Cell]) -> None:
        """Raises ConfigError where the grid sets what is tuned, or has the seed that is held out."""
        tuned = set(self.candidates[0])
        for cell in grid:
            if tuned & set(cell):
                raise ConfigError(f"--tune and the grid must not set the same, got {' '.join(sorted(tuned & set(cell)))}")
            if cell.get("seed", "0") in {on.get("seed") for on in cells(self.on)}:
                raise ConfigError(f"--tune-on needs a seed that the grid has not, got seed={cell.get('seed', '0')}")

    def family(self, cell: Mapping[str, str]) -> str:
        """What the cells that share one choice have in common."""
        return identity({k: v for k, v in cell.items() if k.split(".")[0] not in ("seed", *self.shared) and k not in self.shared})

    def trials(self, cell: Cell, candidate: Cell) -> list[Cell]:
        """The runs that judge a candidate for one cell: the cell, but on the held-out seed and images."""
        return [{**cell, **on, **candidate} for on in cells(self.on)]

    def runs(self, grid: Sequence[Cell]) -> list[Cell]:
        """All runs that choosing for this grid takes, each once."""
        return list({identity(t): t for cell in grid for c in self.candidates for t in self.trials(cell, c)}.values())

    def means(self, grid: Sequence[Cell], lines: Sequence[Line]) -> dict[str, list[tuple[float, Cell]]]:
        """Each family's candidates with their mean accuracy over its runs; without those of which a run is missing."""
        found = {named(line): line["accuracy"] for line in lines}
        table: dict[str, list[tuple[float, Cell]]] = {self.family(cell): [] for cell in grid}
        for family in table:
            members = [cell for cell in grid if self.family(cell) == family]
            for candidate in self.candidates:
                names = {identity(t) for cell in members for t in self.trials(cell, candidate)}
                if names <= set(found):
                    table[family].append((statistics.mean(found[name] for name in names), candidate))
        return table

    def choose(self, grid: Sequence[Cell], lines: Sequence[Line]) -> dict[str, Cell]:
        """Each family's best candidate, the first of equals; none where not all are judged, or all failed."""
        chosen = {}
        for family, judged in self.means(grid, lines).items():
            if len(judged) == len(self.candidates) and max(mean for mean, _ in judged) > 0:
                chosen[family] = max(judged, key=lambda pair: pair[0])[1]
        return chosen
