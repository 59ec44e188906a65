"""What a grid says, in numbers: lines of cells.jsonl -> sections of rows, a row being all seeds of one setting.

What all rows share is said once. Settings of the task (data, partition, model, ...) that differ make sections; the others
name the rows, so that within a section strategies stand below each other, the best first.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, Mapping, NamedTuple, Sequence

from simulations.grid import Line

TASK = ("data", "partition", "model", "clients", "fraction", "rounds", "validation", "evaluate_on")
DIAGNOSTICS = ("product_error", "best_error", "effective_rank", "drift")

Settings = dict[str, str]
Number = float | None


class Row(NamedTuple):
    """All seeds of one setting. ``numbers`` are those of `measure`; None where the lines do not have it."""

    name: str
    settings: Settings
    numbers: dict[str, Number]
    members: list[Line]


class Section(NamedTuple):
    """The rows of one task, the best first; ``target`` is the accuracy that rounds and MB are counted to, in percent."""

    name: str
    target: float
    rows: list[Row]


class Report(NamedTuple):
    """``common`` are the words that all cells share; ``axes`` the settings that name a row; ``share`` as in `report`."""

    common: list[str]
    axes: list[str]
    share: float | None
    sections: list[Section]


def report(lines: Sequence[Line], target: float | None = None, share: float = 0.95) -> Report:
    """The report's numbers. ``target`` in (0, 1]; without it each section's is ``share`` of its best row's mean accuracy."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(sorted(w for w in line["cell"].split() if not w.startswith("seed="))), []).append(line)
    common = sorted(set.intersection(*(set(words) for words in groups)))
    settings = [dict(w.split("=", 1) for w in words if w not in common) for words in groups]
    task = sorted({key for one in settings for key in one if key.lstrip("+~").split(".")[0] in TASK})
    axes = naming(settings, task)
    names = rowed(settings, axes)
    sections: dict[str, list[tuple[str, Settings, list[Line]]]] = {}
    for name, one, members in zip(names, settings, groups.values()):
        where = " ".join(f"{key}={one[key]}" for key in task if key in one)
        sections.setdefault(where, []).append((name, one, sorted(members, key=lambda m: m["cell"])))
    made = [_section(where, rows, target, share) for where, rows in sorted(sections.items())]
    return Report(common, axes, None if target else share, made)


def _section(name: str, rows: Sequence[tuple[str, Settings, list[Line]]], target: float | None, share: float) -> Section:
    aim = target or share * max(statistics.mean(m["accuracy"] for m in members) for _, _, members in rows)
    measured = [Row(n, one, measure(members, aim), members) for n, one, members in rows]
    return Section(name, 100 * aim, sorted(measured, key=lambda row: -row.numbers["accuracy"]))


def naming(settings: Sequence[Settings], task: Sequence[str]) -> list[str]:
    """The settings that tell rows apart: all that differ, without details (first the recipe's) that follow from the others."""
    keys = sorted({key for one in settings for key in one} - set(task), key=lambda k: (k != "strategy", k))
    for key in sorted((k for k in keys if "." in k), key=lambda k: (not k.startswith("recipe."), k)):
        fewer = [k for k in keys if k != key]
        if len({tuple(one.get(k) for k in (*fewer, *task)) for one in settings}) == len(settings):
            keys = fewer
    return keys


def rowed(settings: Sequence[Settings], axes: Sequence[str]) -> list[str]:
    """A short name for each row: of a choice its value, of a number `key=value`; in full where short ones are not unique."""

    def short(key: str, value: str) -> str:
        says = "." not in key and not value[:1].isdigit() and value not in ("true", "false")
        return value.split("/")[-1] if says else f"{key.split('.')[-1]}={value}"

    brief = [" · ".join(short(k, one[k]) for k in axes if k in one) or "all" for one in settings]
    full = [" ".join(f"{k}={one[k]}" for k in axes if k in one) or "all" for one in settings]
    return brief if len(set(brief)) == len(set(full)) else full


def measure(members: Sequence[Line], target: float) -> dict[str, Number]:
    """The numbers of one row, by the names they have in the CSV. Accuracies and shares in percent, MB in 10^6 bytes.

    ``sd`` is the sample standard deviation over seeds. Rounds and MB to the target are means over the seeds, and None
    unless every seed reached it; ``reached`` counts those that did. Diagnostics are of the last round.
    """
    scores = [100 * m["accuracy"] for m in members]
    last = [next((r for r in reversed(history(m)) if "accuracy" in r), {}) for m in members]
    firsts = [next((r for r in history(m) if r.get("accuracy", -1) >= target), None) for m in members]
    hits = [r for r in firsts if r]
    everyone = len(hits) == len(members)
    diagnosed = [next((r["diagnostics"] for r in reversed(history(m)) if r.get("diagnostics")), {}) for m in members]
    seconds = [r["seconds"] for m in members for r in history(m) if "seconds" in r]
    return {
        "accuracy": statistics.mean(scores),
        "sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "seeds": len(scores),
        **{name: percent(mean(r.get(name) for r in last)) for name in ("accuracy_p10", "personal_accuracy", "personal_p10")},
        "reached": len(hits),
        "rounds_to_target": mean(r["round"] for r in hits) if everyone else None,
        "mb_to_target": mean(r["mb"] for r in hits) if everyone else None,
        "mb_per_round": mean(sum(m["bytes_per_client_round"].values()) / 1e6 for m in members),
        "of_full_fedavg": 100 * members[0]["ratio_to_full_fedavg"],
        "seconds_per_round": statistics.median(seconds) if seconds else None,
        "seconds_per_run": statistics.median(m["seconds"] for m in members),
        "trained_parameters": members[0]["trained_parameters"],
        **{name: mean(d.get(name) for d in diagnosed) for name in DIAGNOSTICS},
    }


def history(line: Line) -> list[dict[str, Any]]:
    """The rounds of a line; of an older one, which kept the curve alone, with the MB that its mean message makes."""
    each = sum(line["bytes_per_client_round"].values()) / 1e6
    return line.get("rounds") or [{"round": r, "accuracy": a, "mb": r * each} for r, a in line["curve"]]


def mean(values: Any) -> Number:
    """The mean of the finite numbers among ``values``; None when there is none, or when one is infinite."""
    found = [v for v in values if v is not None]
    return statistics.fmean(found) if found and all(map(math.isfinite, found)) else None


def percent(value: Number) -> Number:
    """A share as percent."""
    return None if value is None else 100 * value


def averaged(row: Row, value: str) -> list[tuple[float, float, float]]:
    """(round, MB, mean over the seeds of ``value``) for each round that every seed has; diagnostics by their names, too."""
    found: dict[int, list[tuple[float, float]]] = {}
    for line in row.members:
        for r in history(line):
            y = r.get(value, r.get("diagnostics", {}).get(value))
            if y is not None and math.isfinite(y):
                found.setdefault(r["round"], []).append((r["mb"], y))
    whole = {r: points for r, points in sorted(found.items()) if len(points) == len(row.members)}
    return [(r, statistics.fmean(mb for mb, _ in points), statistics.fmean(y for _, y in points)) for r, points in whole.items()]


def command(row: Row) -> str:
    """What to type after `beginning` to run this row again."""
    seeds = sorted({w[5:] for m in row.members for w in m["cell"].split() if w.startswith("seed=")}, key=lambda s: (len(s), s))
    words = [f"{key}={value}" for key, value in sorted(row.settings.items())]
    return " ".join([*words, *([f"seed={','.join(seeds)}"] if seeds else [])])


def beginning(lines: Sequence[Line], common: Sequence[str]) -> str:
    """The part that all commands share; DIR and FILE stand for the machine's own places, which no result names."""
    stands = {"data.root": "data.root=DIR", "model.weights": "model.weights=FILE"}
    places = sorted({p for line in lines for p in line.get("places", stands)})
    return " ".join(["python -m simulations.compare --out OUT", *(stands[p] for p in places), *common])


def origins(members: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Which code on which machine: commit, digest, machine and GPU, each as one text over all ``members``."""
    names = {"commit": "commit", "code": "code digest", "machine": "machine", "gpu": "GPU"}
    found = {says: sorted({str(m[name]) for m in members if m.get(name)}) for name, says in names.items()}
    return {says: ", ".join(texts) for says, texts in found.items() if texts}
