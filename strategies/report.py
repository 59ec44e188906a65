"""Reports: what clients tell a blind server of a sum that they opened, and what is made of those that say it does not open."""

from __future__ import annotations

import math
from collections import Counter
from typing import Callable, Generator, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from fl.wire.flat import Packed, WireError, unpack
from fl.wire.octets import octets
from fl.wire.sealed import Total
from strategies.gate import Refused
from strategies.talk import Answer, Facts, Question

OCTETS = octets()


def report(
    round: int, clients: Sequence[int], messages: Callable[[int], Iterator[tuple[Packed, Facts]]], refused: list[Refused],
    figured: Sequence[str], state: bool = False, accused: Counter[int] | None = None,
) -> Generator[Question, Iterable[Answer], Answer | None]:  # fmt: skip
    """The answer of the first of ``clients`` who can tell of the sum: the ``figured`` numbers, and the locked ``state`` if asked.

    None when nobody can, or when two of them, or the only one, say that it does not open: one alone might lie. Of whom they
    say that his message is not his goes to ``accused``; where two do not agree on that, a third is asked.
    """
    closed, accused = 0, Counter() if accused is None else accused
    for client in clients:
        (told,) = yield Question("report", round, {client: messages(client)})
        try:
            if told.refused:
                raise told.refused
            if "refused" in told.facts:
                closed += 1
                named = told.facts.get("strangers")
                accused.update(c for c in clients if isinstance(named, list) and c in named)
                raise Refused(client, "seal", str(told.facts["refused"]))
            figures(told, *figured)
            if state:
                state_of(told)
            return told
        except Refused as reason:
            refused.append(reason)
            if closed == 3 or closed == 2 and (not accused or max(accused.values()) > 1):
                return None
    return None


def ordered(total: Total, first: int) -> list[int]:
    """The members of ``total`` in the order in which they are asked: the one who tells its numbers ``first``, if it is in it."""
    return sorted((client for client, _ in total.members), key=lambda client: (client != first, client))


def trusted(members: Sequence[int], accused: Mapping[int, int], need: int) -> list[int]:
    """The ``members`` without those whose messages two have called a stranger's; all where they would be too few."""
    left = [c for c in members if accused.get(c, 0) < 2]
    return left if len(left) >= need else list(members)


def figures(told: Answer, *names: str) -> dict[str, float]:
    """The numbers of these ``names`` in a report; none where the client is not to tell them (`clients.tell`).

    Raises Refused when it has some and lacks one, or has one that cannot be.
    """
    if not set(names) & set(told.facts):
        return {}
    try:
        found = {name: float(told.facts[name]) for name in names}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise Refused(told.client, "schema", f"a report must hold {' and '.join(names)}, got {sorted(map(str, told.facts))}") from None
    if not all(0 <= value < math.inf and (value <= 1 or "loss" in name) for name, value in found.items()):
        raise Refused(told.client, "metrics", f"a report's numbers must be finite, and shares at most 1, got {found}")
    return found


def state_of(told: Answer) -> Tensor:
    """The locked state in a report. Raises Refused when there is none."""
    try:
        return unpack(told.packed, OCTETS)["sealed.state"]
    except (AttributeError, KeyError, WireError):
        raise Refused(told.client, "schema", "a report must bring the locked state it was asked for, got none") from None
