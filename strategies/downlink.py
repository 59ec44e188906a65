"""What goes down to each client: whole, or as the difference from what it has, in the codecs of the config.

    v_k <- v_k + decode(encode(w - v_k))        w: what the strategy gives client k, v_k: what k then has

The server does the client's arithmetic along with it, so both hold the same v_k to the bit, and what a codec loses in one
message is in the next one's difference. At first v_k is the adapter that all start from. Who is given less to train than to
evaluate, or factors of a rank of its own, has a v_k of each layout. A codec's chance is drawn by v_k, so that clients that
have the same and are given the same share one message, and have the same again. Of a crowd whose clients take part at
different times each comes to have a v_k of its own; of these KEPT are remembered, and who was longest away is sent the
difference from what all start from.
"""

from __future__ import annotations

from typing import Any, Iterator, Mapping, NamedTuple

from fl.adapter import Adapter, add, apart, cut, digest, flat, sub
from fl.randomness import generator
from fl.wire.coding import WHOLE, Coding
from fl.wire.flat import Layout, Packed, pack, packer, unpack
from strategies import State
from strategies.catchup import Catchup


KEPT = 64  # adapters, at most, in the server's memory


class Known(NamedTuple):
    """What a client has, flat, and its digest."""

    adapter: Adapter
    digest: str


class Downlink:
    """The driver's memory of what each client has received; ``start`` is what all have before that."""

    def __init__(self, coding: Coding, catchup: Catchup, seed: int, start: Adapter) -> None:
        self._coding, self._catchup, self._seed, self._start = coding, catchup, seed, start
        self._had: dict[tuple[int, Layout], Known] = {}
        self._begun: dict[Layout, Known | None] = {}
        self._whole = packer(WHOLE)
        self._last: tuple[Adapter, Known, str] | None = None
        self._state: State = None
        self._sent: dict[tuple[str, str], tuple[Packed, Known]] = {}

    def messages(
        self, state: State, upto: int, client: int, adapter: Adapter, facts: Mapping[str, Any] = {}
    ) -> Iterator[tuple[Packed, dict[str, Any]]]:
        """What to send to ``client`` after round ``upto``, and the facts: one after the other until it is no longer behind.

        With a lossy codec the fact ``link`` is the digest of what this is the difference from, of what is whole "".
        """
        first = True
        for message, facts_ in self._catchup.messages(state, upto, client, adapter, facts):
            if first and self._coding.lossy and (found := self._difference(state, client, message)):
                yield found[0], {**facts_, "link": found[1]}
                first = False
                if self._catchup.single:
                    yield self._all(client, message, facts_)
            else:
                yield self._all(client, message, facts_)

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds of this memory: what each client has, in the order in which it would be forgotten."""
        adapters = {known.digest: known.adapter for known in self._had.values()}
        return {"had": [(client, known.digest) for (client, _), known in self._had.items()], "adapters": adapters}

    def recall(self, kept: Mapping[str, Any]) -> None:
        """Remember what `kept` gave."""
        known = {name: Known(adapter, name) for name, adapter in kept["adapters"].items()}
        self._had = {(client, known[name].adapter.layout): known[name] for client, name in kept["had"]}
        self._state = None

    def _all(self, client: int, message: Adapter, facts: dict[str, Any]) -> tuple[Packed, dict[str, Any]]:
        if not self._coding.lossy:
            return self._whole(message), facts
        own, _ = self._weights(message)
        self._remember(client, own)
        return self._whole(message), {**facts, "link": ""}

    def _difference(self, state: State, client: int, message: Adapter) -> tuple[Packed, str] | None:
        """The message, and the digest of what the client must have; None where what it has is not laid out like it."""
        if state is not self._state:
            self._state, self._sent = state, {}
        own, whole = self._weights(message)
        layout = own.adapter.layout
        had = self._had.get((client, layout)) or self._first(layout)
        if had is None:
            return None
        if (had.digest, whole) not in self._sent:
            riders = {n: t for n, t in message.items() if n not in own.adapter}
            step = {**sub(own.adapter, had.adapter), **riders}
            packed = pack(step, self._coding.differences, generator(self._seed, "down", had.digest))
            has = add(had.adapter, flat(apart(unpack(packed, self._coding.differences)).own))
            self._sent[had.digest, whole] = packed, Known(has, digest(has))
        packed, has = self._sent[had.digest, whole]
        self._remember(client, has)
        return packed, had.digest

    def _remember(self, client: int, has: Known) -> None:
        """Keep what ``client`` has, as the newest of all; of more than KEPT different ones the oldest are forgotten."""
        self._had.pop((client, has.adapter.layout), None)
        self._had[client, has.adapter.layout] = has
        while len({known.digest for known in self._had.values()}) > KEPT:
            del self._had[next(iter(self._had))]

    def _weights(self, message: Adapter) -> tuple[Known, str]:
        """The weights in a message, and its digest; worked out once for clients in a row that are given the same one."""
        if self._last is None or self._last[0] is not message:
            own = flat(apart(message).own)
            name = digest(own)
            self._last = message, Known(own, name), name if len(own) == len(message) else digest(message)
        return self._last[1:]

    def _first(self, layout: Layout) -> Known | None:
        """What all have of this layout before anything was sent."""
        if layout not in self._begun:
            found = cut(self._start, layout)
            self._begun[layout] = Known(found, digest(found)) if found is not None else None
        return self._begun[layout]
