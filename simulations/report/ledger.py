"""Where the bytes go: by group and direction, from the ledger that each line keeps."""

from __future__ import annotations

from collections import Counter
from typing import Mapping

from fl.wire.ledger import ENVELOPE, HEADER
from simulations.report.numbers import Row, Section
from strategies.history import is_training

REST = "header, envelope"


def by_group(row: Row) -> dict[str, tuple[float, float]]:
    """kB down and up for a client and a round of training, by group; the first seed's, since all cost the same. {} without."""
    sums: Mapping[str, Mapping[str, int]] = row.members[0].get("bytes") or {}
    ways = {way: Counter() for way in ("down", "up")}
    for name, sizes in sums.items():
        if is_training(name, sums):
            for group, size in sizes.items():
                if group not in ("total", "messages"):
                    ways[name.split()[-1]][REST if group in (HEADER, ENVELOPE) else group] += size
    total = sums.get("train up", {}).get("total", 0)
    if not total:
        return {}
    each = row.members[0]["bytes_per_client_round"]
    times = {way: ways[way].total() / each[way] if each[way] else 1 for way in ways}
    return {g: tuple(ways[w][g] / times[w] / 1e3 for w in ("down", "up")) for g in sorted(ways["down"] | ways["up"], key=lambda g: (g == REST, g))}


def body(section: Section) -> tuple[list[str], list[list[str]]]:
    """The groups, and for each row its name and ``down / up`` of each group; no rows where no line keeps a ledger."""
    found = {row.name: by_group(row) for row in section.rows}
    groups = sorted({g for sizes in found.values() for g in sizes}, key=lambda g: (g == REST, g))
    shown = [[name, *(f"{sizes[g][0]:,.1f} / {sizes[g][1]:,.1f}" if g in sizes else "–" for g in groups)] for name, sizes in found.items() if sizes]
    return groups, shown
