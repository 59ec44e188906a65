"""Plots as SVG text: dots with bars, and lines with their names at their ends. They need no script and no font of their own.

A line is a list of (x, y); what is not ``coloured`` is drawn thin and grey behind the others. Colours are Okabe and Ito's,
which people who see few colours can tell apart; names stand beside the lines, so that nobody must match a legend.
"""

from __future__ import annotations

import math
import statistics
from html import escape
from typing import Mapping, NamedTuple, Sequence

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a")
REFERENCE, GREY, INK, FAINT = "#222222", "#c9c9c9", "#333333", "#e7e7e7"

Points = Sequence[tuple[float, float]]


class Scale(NamedTuple):
    """From a value to a place on the paper, between ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers within the scale: 1, 2 or 5 times a power of ten; on a log scale all of these, or the powers alone."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            fine = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
            return fine if len(fine) <= about + 3 else [v for v in fine if math.log10(v) % 1 < 1e-9]
        rough = (self.high - self.low) / about or 1
        power = 10 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        return [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def dots(names: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[float]]], colours: Mapping[str, str], label: str) -> str:
    """One row for each name, one panel for each section: every value as a ring, their mean as a dot, ± sd as a bar."""
    left = 30 + round(7.4 * max(map(len, names)))
    gap, line, top = 34, 24, 34
    width = min(640, max(240, (1020 - left) // len(panels) - gap))
    bottom = top + line * len(names)
    parts = []
    for i, name in enumerate(names):
        y = top + line * (i + 0.5)
        parts.append(_text(left - 14, y + 4, name, "end", colours.get(name, INK), weight=600 if name in colours else 400))
    for p, (title, rows) in enumerate(panels.items()):
        start = left + p * (width + gap)
        x = _padded([v for scores in rows.values() for v in (*scores, *_bar(scores))], start + 8, start + width - 8)
        parts.append(_text(start + width / 2, 16, title, "middle", INK, 13, 600))
        for t in x.ticks(6):
            parts.append(f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{top}" y2="{bottom}" stroke="{FAINT}"/>')
            parts.append(_text(x(t), bottom + 16, _number(t), "middle"))
        for i, name in enumerate(names):
            y, scores, colour = top + line * (i + 0.5), rows.get(name, ()), colours.get(name, "#767676")
            if not scores:
                continue
            low, high = _bar(scores)
            parts.append(f'<line x1="{start}" x2="{start + width}" y1="{y}" y2="{y}" stroke="{FAINT}" stroke-dasharray="1 3"/>')
            parts.append(f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"/>')
            ring = f'r="3" fill="white" stroke="{colour}" stroke-width="1.3"'
            parts += [f'<circle cx="{x(s):.1f}" cy="{y}" {ring}/>' for s in scores]
            parts.append(f'<circle cx="{x((low + high) / 2):.1f}" cy="{y}" r="5.5" fill="{colour}" stroke="white"/>')
    whole = left + len(panels) * width + (len(panels) - 1) * gap
    parts.append(_text((left + whole) / 2, bottom + 36, label, "middle"))
    return _svg(whole + 12, bottom + 46, parts)


def lines(
    title: str,
    series: Mapping[str, Points],
    colours: Mapping[str, str],
    labels: tuple[str, str],
    whole: int = 505,
    logs: str = "",
    aim: float | None = None,
) -> str:
    """One panel of lines over x, coloured ones named at their ends.

    ``logs`` says which axes are logarithmic ("", "x", "y", "xy"); ``aim`` is a level to draw dashed. Of lines that climb from
    far below only the last part is shown, in which they differ.
    """
    left, top, height = 58, 34, 280
    named = [n for n in series if n in colours]
    width = max(240, whole - left - 26 - round(7.4 * max(map(len, named), default=0)))
    right = left + width
    xs, ys = ([p[i] for points in series.values() for p in points] for i in (0, 1))
    if aim is not None:
        ys = [max(v, foot([points[-1][1] for points in series.values()])) for v in ys]
    x = Scale(min(xs), max(xs), left + 6, right - 6, "x" in logs)
    y = _padded([*ys, *([] if aim is None else [aim])], top + height, top, "y" in logs)
    parts = [_text(left + width / 2, 16, title, "middle", INK, 13, 600)]
    for t in y.ticks(6):
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y(t):.1f}" y2="{y(t):.1f}" stroke="{FAINT}"/>')
        parts.append(_text(left - 6, y(t) + 4, _number(t), "end"))
    for t in x.ticks():
        if labels[0] != "round" or t == round(t):
            parts.append(f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{top + height}" y2="{top + height + 4}" stroke="#888"/>')
            parts.append(_text(x(t), top + height + 17, _number(t), "middle"))
    parts.append(_text(left + width / 2, top + height + 36, labels[0], "middle"))
    parts.append(f'<text transform="translate(12 {top + height / 2}) rotate(-90)" text-anchor="middle">{escape(labels[1])}</text>')
    if aim is not None:
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y(aim):.1f}" y2="{y(aim):.1f}" stroke="#888" stroke-dasharray="4 4"/>')
    for name in sorted(series, key=lambda n: n in colours):
        where = [f"{x(a):.1f},{y(b):.1f}" for a, b in series[name]]
        stroke, thick = (colours[name], 2) if name in colours else (GREY, 1)
        style = f'fill="none" stroke="{stroke}" stroke-width="{thick}" stroke-linejoin="round"'
        cut = f'<svg x="0" y="{top}" width="{right}" height="{height}" viewBox="0 {top} {right} {height}">'  # nothing shows outside
        parts.append(f'{cut}<polyline points="{" ".join(where)}" {style}/></svg>')
        parts.append('<circle cx="{}" cy="{}" r="{}" fill="{}"/>'.format(*where[-1].split(","), thick * 1.6, stroke))
    ends = {name: y(series[name][-1][1]) for name in named if series[name]}
    for name, place in spaced(ends, 14, top + 4, top + height).items():
        ax, ay = x(series[name][-1][0]), ends[name]
        leader = f"M{ax + 5:.1f} {ay:.1f}L{right + 10} {place:.1f}"
        parts.append(f'<path d="{leader}" stroke="{colours[name]}" stroke-dasharray="1 3" fill="none"/>')
        parts.append(_text(right + 14, place + 4, name, "start", colours[name], weight=600))
    return _svg(right + 26 + round(7.4 * max(map(len, named), default=0)), top + height + 46, parts)


def foot(ends: Sequence[float]) -> float:
    """Where the y axis may begin for lines with these last values: twice their range below the lowest, at least 10."""
    return min(ends) - max(2 * (max(ends) - min(ends)), 10)


def spaced(places: Mapping[str, float], apart: float, low: float, high: float) -> dict[str, float]:
    """The places moved as little as sorting allows, until each is ``apart`` from the next and all lie in [low, high]."""
    order = sorted(places, key=places.__getitem__)
    moved = [places[name] for name in order]
    for _ in range(200):
        for i in range(len(moved) - 1):
            if (lack := apart - (moved[i + 1] - moved[i])) > 1e-6:
                moved[i], moved[i + 1] = moved[i] - lack / 2, moved[i + 1] + lack / 2
        if moved:
            moved[-1] = min(moved[-1], high)
            moved[0] = max(moved[0], low)
    return dict(zip(order, moved))


def palette(names: Sequence[str], most: int = 8) -> dict[str, str]:
    """Colours for the first ``most`` of ``names``; plain fedavg is always among them, in black, to compare with."""
    reference = [n for n in names if n == "fedavg"][:1]
    others = [n for n in names if n not in reference][: min(most, len(PALETTE) + len(reference)) - len(reference)]
    return {n: REFERENCE for n in reference} | dict(zip(others, PALETTE))


def _bar(scores: Sequence[float]) -> tuple[float, float]:
    """Mean ∓ the sample standard deviation."""
    middle, sd = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
    return middle - sd, middle + sd


def _padded(values: Sequence[float], start: float, end: float, log: bool = False) -> Scale:
    low, high = min(values), max(values)
    if log:
        return Scale(low / 1.3, high * 1.3, start, end, log)
    pad = (high - low) * 0.06 or max(abs(high) * 0.02, 0.5)
    return Scale(low - pad, high + pad, start, end)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e-4 else "0" if not value else f"{value:.0e}"


def _text(x: float, y: float, text: str, anchor: str, fill: str = "#555555", size: int = 12, weight: int = 400) -> str:
    style = f'text-anchor="{anchor}" fill="{fill}" font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#555555" role="img">{"".join(parts)}</svg>\n'
    )
