"""The byte ledger: what each message cost, by direction and group, and what full-model FedAvg would have cost."""

from __future__ import annotations

from collections import Counter
from typing import Mapping, NamedTuple

from fl.wire.flat import group_bytes

HEADER, ENVELOPE = "header", "envelope"  # the adapter's header; facts, and what the transport adds


class Entry(NamedTuple):
    """One message; ``sizes`` are bytes by group, header and envelope.

    ``kind`` is query, train, evaluate or report, ``way`` is down or up.
    """

    kind: str
    way: str
    sizes: Mapping[str, int]

    @property
    def total(self) -> int:
        """All bytes of the message."""
        return sum(self.sizes.values())


def entry(kind: str, way: str, header: str, total: int) -> Entry:
    """Split a message of ``total`` bytes by the groups that its ``header`` lists; the rest is header and envelope."""
    sizes = group_bytes(header) | {HEADER: len(header.encode())} if header else {}
    return Entry(kind, way, sizes | {ENVELOPE: total - sum(sizes.values())})


def summarise(entries: list[Entry]) -> dict[str, dict[str, int]]:
    """``{"train down": {group: bytes, ..., "total": bytes, "messages": n}, ...}``."""
    sums: dict[str, Counter[str]] = {}
    for e in entries:
        sums.setdefault(f"{e.kind} {e.way}", Counter()).update({**e.sizes, "total": e.total, "messages": 1})
    return {name: dict(counter) for name, counter in sorted(sums.items())}
