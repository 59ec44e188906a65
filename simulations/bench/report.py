"""What a section of the bench found: rows with their limits and targets, as Markdown and as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from fl.provenance import environment
from simulations.bench.pairs import Spread


class Options(NamedTuple):
    """What the command was asked for; ``data`` holds cifar-10-batches-py."""

    pairs: int = 5
    quick: bool = False
    data: Path | None = None


class Check(NamedTuple):
    """A target and what was got: ``sense`` is >= or <=; ``of`` names the unit, as in "x peft float32".

    What needs a machine that is not here has got None and is open. ``limit`` is what this machine could get at best; a target
    beyond it is missed here whatever the code does.
    """

    got: float | None
    sense: str
    bound: float
    of: str
    limit: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None while that is open."""
        if self.got is None:
            return None
        return self.got >= self.bound if self.sense == ">=" else self.got <= self.bound

    def __str__(self) -> str:
        if self.got is None:
            return f"{self.sense} {self.bound:g}{self.of}: open"
        beyond = f" (this machine's limit: {self.limit:.3g})" if self.limit is not None and not self.met else ""
        return f"{self.sense} {self.bound:g}{self.of}: {self.got:.3g}, {'met' if self.met else '**missed**'}{beyond}"


class Row(NamedTuple):
    """One candidate: its figure, how many times faster than the section's baseline, and what the machine could do."""

    name: str
    figure: float
    unit: str
    ratio: Spread | None = None
    limit: str = ""
    checks: tuple[Check, ...] = ()


class Section(NamedTuple):
    """A table: its name, a line that says what was timed, the baseline of its ratios."""

    name: str
    title: str
    baseline: str
    rows: list[Row]


def markdown(section: Section) -> str:
    """The table of a section, with its title."""
    lines = [f"**{section.name}**: {section.title}", ""]
    lines += [f"| | figure | against {section.baseline} | the machine could do | target |", "|---|---|---|---|---|"]
    for row in section.rows:
        checks = "; ".join(map(str, row.checks))
        cells = (row.name, f"{row.figure:,.4g} {row.unit}", str(row.ratio or ""), row.limit, checks)
        lines.append("| " + " | ".join(cell or "-" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def save(sections: list[Section], name: str, options: Options, load_before: float, folder: Path) -> None:
    """Write ``folder/<name>.json``, and ``folder/README-table.md`` anew from all the JSON files there."""
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "sections": [plain(section) for section in sections],
        "pairs": options.pairs,
        "quick": options.quick,
        "load": [load_before, os.getloadavg()[0]],
        "environment": environment(),
        "markdown": "\n".join(map(markdown, sections)),
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    tables = [json.loads(path.read_text())["markdown"] for path in sorted(folder.glob("*.json"))]
    (folder / "README-table.md").write_text("\n".join(tables))


def plain(section: Section) -> dict[str, Any]:
    """A section as JSON holds it: names for everything, and whether each target was met."""
    rows = [
        row._asdict()
        | {"ratio": row.ratio and row.ratio._asdict(), "checks": [check._asdict() | {"met": check.met} for check in row.checks]}
        for row in section.rows
    ]
    return section._asdict() | {"rows": rows}
