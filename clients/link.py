"""Both ends of a client's wire: what arrived as an adapter, and an update as what is sent.

With a lossy codec a message down is a difference from what this client last received of that layout, at first from the
adapter that all start from; and what the codec lost of an update is added to the next one: error feedback (Seide et al.
2014; Karimireddy et al., arXiv 1901.09847). Both outlive a round in the client's `Drawer`; with float32 no disk is touched.

    sent = decode(encode(u + e))        e <- u + e - sent
"""

from __future__ import annotations

import hashlib

from clients.carried import Behind
from clients.state import Drawer, StateError
from fl.adapter import Adapter, add, apart, cut, digest, flat, sub
from fl.flat import Layout
from fl.randomness import generator
from fl.wire.coding import WHOLE, Coding
from fl.wire.flat import Packed, pack, unpack

RECEIVED, LOST = "received", "lost"  # the files' names


def arrived(
    drawer: Drawer, coding: Coding, packed: Packed, link: str | None, start: Adapter, kind: str = "train", round: int = 0
) -> Adapter:
    """The adapter in a message; ``link`` is the digest of what it is the difference from, of one that is whole "".

    It is None where nothing travels as a difference. ``start`` is what this client has before anything has arrived. What
    arrived is kept by the ``kind`` and ``round`` of the message: asked again, it is there once. Raises WireError, and Behind
    when what this client has is not what the server took it to have.
    """
    if link is None:
        return unpack(packed, WHOLE)
    message = unpack(packed, coding.differences if link else WHOLE)
    own = flat(apart(message).own)
    what = f"{RECEIVED}-{hashlib.sha256(repr(own.layout).encode()).hexdigest()[:8]}"
    if link:
        own = add(_had(drawer, what, link) or _begun(drawer, start, link, own.layout), own)
    drawer.keep(f"{what}-{kind}", round, own)
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


def _had(drawer: Drawer, what: str, link: str) -> Adapter | None:
    """What arrived with this digest. A round that broke off has sent more since, so all that is kept is looked at, newest first."""
    kept = [(round, kind) for kind, round in drawer.listing() if kind.startswith(what)]
    for round, kind in sorted(kept, key=lambda one: (one[0], one[1].endswith("train")), reverse=True):
        try:
            found = drawer.recall(kind, round)
        except StateError:
            continue
        if found and digest(found[1]) == link:
            return flat(found[1])
    return None


def _begun(drawer: Drawer, start: Adapter, link: str, layout: Layout) -> Adapter:
    begun = cut(start, layout)
    if begun is None or digest(begun) != link:
        raise Behind(f"client {drawer.client} does not have what the difference it was sent is from")
    return begun
