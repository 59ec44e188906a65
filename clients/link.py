"""Both ends of a client's wire: what arrived as an adapter, and an update as what is sent.

With a lossy codec a message down is a difference from what this client last received, and what the codec lost of an update
is added to the next one: error feedback (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847). Both outlive a round in
the client's `Drawer`; with float32 no disk is touched.

    sent = decode(encode(u + e))        e <- u + e - sent
"""

from __future__ import annotations

from typing import Sequence

from clients.carried import Behind
from clients.state import Drawer, StateError
from fl.adapter import Adapter, add, apart, digest, flat, sub
from fl.randomness import generator
from fl.wire.coding import WHOLE, Coding
from fl.wire.flat import Packed, pack, unpack

RECEIVED, LOST = "received", "lost"  # the files' names


def arrived(drawer: Drawer, coding: Coding, packed: Packed, link: Sequence | None) -> Adapter:
    """The adapter in a message; ``link`` is its number, and the digest of what it is the difference from or None.

    Raises WireError, and Behind when what this client has is not what the server took it to have.
    """
    if link is None:
        return unpack(packed, WHOLE)
    number, on = int(link[0]), link[1]
    message = unpack(packed, WHOLE if on is None else coding.differences)
    own = flat(apart(message).own)
    if on is not None:
        own = add(_had(drawer, number, on), own)
    drawer.keep(RECEIVED, number, own, last=1)
    return {**message, **own} if len(message) > len(own) else own


def leaving(drawer: Drawer, coding: Coding, seed: int, round: int, update: Adapter) -> Packed:
    """``update`` as it is sent, and what that loses kept for the next one."""
    if not coding.lossy:
        return pack(update, WHOLE)
    stream = generator(seed, "up", round, drawer.client)
    if not coding.feedback:
        return pack(update, coding.differences, stream)
    found = drawer.recall(LOST, round - 1)
    lost = dict(found[1]) if found else {}
    wished = {n: t + lost[n] if n in lost and lost[n].shape == t.shape else t for n, t in update.items()}
    packed = pack(wished, coding.differences, stream)
    drawer.keep(LOST, round, {**lost, **sub(wished, unpack(packed, coding.differences))})
    return packed


def _had(drawer: Drawer, number: int, on: str) -> Adapter:
    try:
        found = drawer.recall(RECEIVED, number - 1)
    except StateError:
        found = None
    if found is None or digest(found[1]) != on:
        raise Behind(f"client {drawer.client} does not have what message {number} builds on")
    return flat(found[1])
