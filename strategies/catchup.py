"""What each client has of the base's change, as the driver remembers it: who was away is sent all that he missed.

Messages of a strategy that leaves the base alone pass as they are.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, Iterator, Mapping, Sequence

from fl.adapter import Adapter, ride
from fl.base import grow, numbered
from strategies import State, Strategy


class Catchup:
    """The driver's memory of a run under ``strategy``."""

    def __init__(self, strategy: Strategy) -> None:
        self._base = strategy.base
        self._seen: dict[int, int] = {}
        self._last: tuple[Adapter, tuple[int, int], Adapter] | None = None

    @property
    def single(self) -> bool:
        """Whether the base never changes, so that `messages` gives one message alone."""
        return self._base is None

    def kept(self) -> dict[int, int]:
        """What a checkpoint holds of this memory: up to which round each client has the base."""
        return dict(self._seen)

    def recall(self, kept: Mapping[int, int]) -> None:
        """Remember what `kept` gave."""
        self._seen = dict(kept)

    def messages(
        self, state: State, upto: int, client: int, adapter: Adapter, facts: Mapping[str, Any] = {}
    ) -> Iterator[tuple[Adapter, dict[str, Any]]]:
        """What to send to ``client`` after round ``upto``: ``adapter`` with what it lacks of the base, and the facts.

        To be sent one after the other until the client no longer answers that it is behind: the second one holds the whole
        change. The fact ``base`` is the rounds after which and up to which the change is.
        """
        if self._base is None:
            yield adapter, dict(facts)
            return
        for known in (self._seen.get(client, 0), 0):
            since, steps = self._base(state, known)
            self._seen[client] = upto
            yield self._joined(adapter, steps, (since, upto)), {**facts, "base": [since, upto]}

    def whole(self, state: State, adapter: Adapter) -> Adapter:
        """``adapter`` with the whole change of the base, from which the model can be rebuilt."""
        return adapter if self._base is None else {**adapter, **ride("base", reduce(grow, self._base(state, 0)[1], {}))}

    def _joined(self, adapter: Adapter, steps: Sequence[Adapter], span: tuple[int, int]) -> Adapter:
        """Both in one message, the same object for clients in a row that need the same, so that it is packed once."""
        if self._last is None or self._last[0] is not adapter or self._last[1] != span:
            self._last = adapter, span, {**adapter, **ride("base", numbered(steps))}
        return self._last[2]
