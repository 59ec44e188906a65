"""The report as files: report.html with its plots, report.md and report.csv, all of the same numbers.

The HTML holds all it needs, works without scripts and prints.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Sequence

from simulations.grid import Line
from simulations.report import plots
from simulations.report.numbers import Report, averaged, origins, report
from simulations.report.tables import EXACT, READING, Table, as_csv, commands, markdown, ranked, tables, target_says, tuned
from simulations.report.trials import Trials, trials


def write(folder: Path, lines: Sequence[Line], tuning: Sequence[Line], target: float | None = None) -> Path:
    """Write the three files into ``folder``, from the lines of its cells and of its tuning. Returns the HTML's path."""
    found, tried = report(lines, target), trials(tuning, lines)
    (folder / "report.csv").write_text(as_csv(found))
    (folder / "report.md").write_text(markdown(folder.resolve().name, found, tried, lines))
    (folder / "report.html").write_text(html(folder.resolve().name, found, tried, lines))
    return folder / "report.html"


def html(title: str, found: Report, tried: Trials | None, lines: Sequence[Line]) -> str:
    """The page."""
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{len(lines)} runs. {escape(target_says(found))}</p>"]
    parts += [f"<p>Common to all: <code>{escape(' '.join(found.common))}</code></p>"] if found.common else []
    drawn, made = _plots(found), [_table(t) for t in tables(found)]
    parts += [drawn[0], *([made.pop(0)] if len(found.sections) > 1 else []), *drawn[1:], *made, f"<p class=note>{READING}</p>"]
    parts += [_table(tuned(tried))] if tried else []
    parts += ["<h2>To run a row again</h2>", f"<pre>{escape(commands(found, lines))}</pre>"]
    parts += ["<dl>", *(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in origins(lines).items()), "</dl>"]
    return PAGE.replace("TITLE", escape(title)).replace("BODY", "\n".join(parts))


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in table.body)
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    grid = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"
    return f"<section><h2>{escape(table.title)}</h2>{note}{grid}</section>"


def _plots(found: Report) -> list[str]:
    """Final accuracies first; then, a panel a section, accuracy by round and by MB, and the product error by round."""
    names = ranked(found)
    colours = plots.palette(names)
    finals = {s.name: {r.name: [100 * m["accuracy"] for m in r.members] for r in s.rows} for s in found.sections}
    drawing = plots.dots(names, finals, colours, "accuracy, %")
    caption = "Rings are seeds, the dot is their mean, the bar ± one standard deviation."
    figures = [_figure("Accuracy after the last round", drawing, caption)]
    for title, value, axis, across in (
        ("Accuracy by round", "accuracy", 0, "round"),
        ("Accuracy by what it cost", "accuracy", 1, "MB a client sent and received"),
        ("Product error by round", "product_error", 0, "round"),
    ):
        scale, up, level = (100, "accuracy, %", True) if value == "accuracy" else (1, "product error", False)
        panels, exact, silent = [], set(), set()
        for s in found.sections:
            series = {r.name: [(p[axis], scale * p[2]) for p in averaged(r, value)] for r in s.rows}
            if not level:
                exact |= {name for name, points in series.items() if points and max(y for _, y in points) < EXACT}
                series = {name: [p for p in points if p[1] >= EXACT] for name, points in series.items()}
            series = {name: points for name, points in series.items() if points}
            if axis == 1:  # who sends next to nothing would stretch the axis for all
                most = max((points[-1][0] for points in series.values()), default=0)
                silent |= {name for name, points in series.items() if points[-1][0] < most / 1000}
                series = {name: points for name, points in series.items() if name not in silent}
            if max(map(len, series.values()), default=0) < 2:
                continue
            ends = [points[-1][0] for points in series.values()]
            logs = ("x" if axis == 1 and max(ends) > 10 * min(ends) else "") + ("" if level else "y")
            whole = 505 if len(found.sections) > 1 else 840
            panels.append(plots.lines(s.name, series, colours, (across, up), whole, logs, s.target if level else None))
        caption = "Means over the seeds." + (" Dashed: the target. The axis does not begin at 0." if level else "")
        caption += f" Without error, so not drawn: {', '.join(n for n in names if n in exact)}." if exact else ""
        caption += f" Not drawn, for they send next to nothing: {', '.join(n for n in names if n in silent)}." if silent else ""
        if panels:
            figures.append(_figure(title, "".join(panels), caption))
    return figures


def _figure(title: str, drawing: str, caption: str) -> str:
    return f"<figure><h2>{escape(title)}</h2><div class=panels>{drawing}</div><figcaption>{escape(caption)}</figcaption></figure>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>TITLE</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 1080px; margin: 2.5rem auto; padding: 0 1.5rem }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem }
code, pre { font: 12.5px/1.6 ui-monospace, monospace; background: #f6f6f4 } code { padding: .1em .3em }
pre { padding: .9rem 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 4px }
figure, section { margin: 0; break-inside: avoid } figcaption, .note { color: #666; font-size: .85rem; margin: .3rem 0 }
.panels { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th { text-align: right; vertical-align: bottom; font-weight: 600; line-height: 1.25 }
th { border-bottom: 1.5px solid #222; padding: .3rem .6rem }
td { text-align: right; border-bottom: 1px solid #e7e7e7; padding: .28rem .6rem; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 } td:first-child { font-weight: 600 }
dt { font-weight: 600; float: left; clear: left; margin-right: .6rem } dd { margin: 0 }
@media print { body { margin: 0; max-width: none; font-size: 11px } pre { font-size: 9px } table { font-size: 9.5px }
  .panels svg:not(:only-child) { width: 48% } .panels { gap: 0 2% } }
</style></head><body>
BODY
</body></html>
"""
