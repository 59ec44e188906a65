"""What goes down to each client: whole, or as the difference from what it has, in the codecs of the config.

    v_k <- v_k + decode(encode(w - v_k))        w: what the strategy gives client k, v_k: what k then has

The server does the client's arithmetic along with it, so both hold the same v_k to the bit, and what a codec loses in one
message is in the next one's difference. Clients that have the same v_k and are given the same share one message.
"""

from __future__ import annotations

from typing import Any, Iterator, Mapping

from fl.adapter import Adapter, add, alike, apart, digest, flat, sub
from fl.randomness import generator
from fl.wire.coding import WHOLE, Coding
from fl.wire.flat import Packed, pack, packer, unpack
from strategies import State
from strategies.catchup import Catchup


class Downlink:
    """The driver's memory of what each client has received."""

    def __init__(self, coding: Coding, catchup: Catchup, seed: int) -> None:
        self._coding, self._catchup, self._seed = coding, catchup, seed
        self._had: dict[int, Adapter] = {}
        self._number = 0
        self._whole = packer(WHOLE)
        self._first: tuple[Adapter, Adapter, dict[str, Any]] | None = None
        self._last: tuple[Adapter, Adapter, Packed, Adapter, dict[str, Any]] | None = None

    def messages(
        self, state: State, upto: int, client: int, adapter: Adapter, facts: Mapping[str, Any] = {}
    ) -> Iterator[tuple[Packed, dict[str, Any]]]:
        """What to send to ``client`` after round ``upto``, and the facts: one after the other until it is no longer behind.

        With a lossy codec the fact ``link`` is the number of this adapter and, of a difference, the digest of what it is from.
        """
        first = True
        for message, facts_ in self._catchup.messages(state, upto, client, adapter, facts):
            if first and (found := self._difference(client, message)):
                yield found[0], facts_ | found[1]
                first = False
                if self._catchup.single:
                    yield self._all(client, message, facts_)
            else:
                yield self._all(client, message, facts_)

    def _all(self, client: int, message: Adapter, facts: dict[str, Any]) -> tuple[Packed, dict[str, Any]]:
        if not self._coding.lossy:
            return self._whole(message), facts
        if self._first is None or self._first[0] is not message:
            self._number += 1
            self._first = message, flat(apart(message).own), {"link": [self._number, None]}
        self._had[client] = self._first[1]
        return self._whole(message), facts | self._first[2]

    def _difference(self, client: int, message: Adapter) -> tuple[Packed, dict[str, Any]] | None:
        had = self._had.get(client)
        if had is None:
            return None
        if self._last is None or self._last[0] is not message or self._last[1] is not had:
            own = flat(apart(message).own)
            if not alike(own, had):
                return None
            self._number += 1
            step = sub(own, had)
            riders = {n: t for n, t in message.items() if n not in own}
            packed = pack({**step, **riders}, self._coding.differences, generator(self._seed, "down", self._number))
            has = add(had, flat(apart(unpack(packed, self._coding.differences)).own))
            self._last = message, had, packed, has, {"link": [self._number, digest(had)]}
        self._had[client] = self._last[3]
        return self._last[2], self._last[4]
