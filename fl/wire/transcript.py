"""The transcript of a secure run: 32 bytes that all have alike who followed the same sums. Computing it needs no key.

    T_0 = SHA256("veilora transcript" | run | config | fingerprint of the seal key)
    T_r = SHA256(T_{r-1} | r | members with their nonces | SHA256(payload of the sum of round r))

Each part stands behind its length. Masks and tags of round r's training are bound to T_{r-1}, those of its evaluation to
T_r, and locked states to T_0: what belongs to another run, config, key, history or list of members does not open.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from fl.config import Config
from fl.wire.sealed import Total, listed

BYTES = 32


def begin(run: str, config: Config, key: str) -> bytes:
    """T_0 of ``run``. ``key`` is the seal key's fingerprint, which names its epoch."""
    return _digest(b"veilora transcript", run.encode(), config.canonical().encode(), key.encode())


def follow(transcript: bytes, round: int, total: Total) -> bytes:
    """T_r from T_{r-1} and the sum that was taken in ``round``."""
    return step(transcript, round, listed(total), hashlib.sha256(total.payload).digest())


def step(transcript: bytes, round: int, members: bytes, payload: bytes) -> bytes:
    """T_r from the list of members (`fl.wire.sealed.listed`) and the digest of the payload: all that a record holds of a sum."""
    return _digest(transcript, str(round).encode(), members, payload)


def bound(transcript: bytes, kind: Literal["train", "evaluate"]) -> str:
    """The text that masks and tags are bound to: the ``transcript`` that their owner stands on, and the ``kind`` of the message."""
    return f"{kind} {transcript.hex()}"


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()
